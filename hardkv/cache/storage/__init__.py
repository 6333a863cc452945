"""What a layer stores: tiers of tokens, the ring of queries, room at fixed addresses, tiers on the host."""
