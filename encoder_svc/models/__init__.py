"""The vision encoders: one file per family, shared layers, checkpoint loading, the registry of families."""
