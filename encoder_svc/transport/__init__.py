"""How tensor bytes leave the server: inline chunks in the answer."""
