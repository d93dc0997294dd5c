"""Devices in processes of their own: each has the model and encodes the batches that the server's process gives it."""
