"""From patches to embeddings: the scheduler, the device runner, and the engine that joins them."""
