"""Low-level operations: one folder per operation, with its PyTorch reference. They know no cache and no scorer."""
