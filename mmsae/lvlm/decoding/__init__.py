"""Decoding that is guided by concepts."""
