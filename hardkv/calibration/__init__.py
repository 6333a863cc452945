"""Measuring a model once: temperatures and risk curves of every KV head, and the file that keeps them."""
