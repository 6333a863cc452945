"""Records of what a cache holds: statistics of the present, and a trace over time."""
