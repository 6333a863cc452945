"""How it runs: one operation a folder, with its PyTorch reference. Nothing here knows a cache or a scorer."""
