"""Selection events choose the tokens that stay and build the new tiers. They use tensors only: no model, no cache."""
