"""Decoding with a cache: captured steps at fixed addresses, and a plan of the cache's memory."""
