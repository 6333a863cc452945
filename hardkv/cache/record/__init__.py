"""What a cache held: statistics of now, and a trace over time."""
