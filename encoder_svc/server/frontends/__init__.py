"""Processes that answer calls for one that has the device: they read messages, decode images, and stream embeddings."""
