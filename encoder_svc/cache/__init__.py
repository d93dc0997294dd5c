"""Keys of results: what two images must share for their embeddings to be the same."""
