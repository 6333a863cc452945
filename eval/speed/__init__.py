"""Measure the time of hardkv's kernels and events: `python -m eval.speed.NAME --help`."""
