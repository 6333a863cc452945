"""Measure accuracy and speed of hardkv: command-line programs, `python -m eval.NAME --help`."""
