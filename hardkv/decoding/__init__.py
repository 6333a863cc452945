"""Decoding over a cache: captured steps at fixed addresses, and the plan of its memory."""
