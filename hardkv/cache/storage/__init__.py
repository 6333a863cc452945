"""What a layer stores: tiers of tokens, a ring of queries, pools at fixed addresses, and tiers in host memory."""
