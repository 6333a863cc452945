"""Accuracy and speed of hardkv, measured: command-line programs, `python -m eval.NAME --help`."""
