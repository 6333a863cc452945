"""How it runs: one operation a file, each with its PyTorch reference. Nothing here knows a cache or a scorer."""
