"""Selection events: which tokens stay, and the tiers that hold them. Functions of tensors: no model, no cache."""
