"""The connection to transformers: registries, masks, and the handles that stand for keys and values."""
