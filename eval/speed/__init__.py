"""What hardkv's kernels and events cost in time: `python -m eval.speed.NAME --help`."""
