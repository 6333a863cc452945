"""The way into transformers: registries, masks, and what travels in place of keys and values."""
