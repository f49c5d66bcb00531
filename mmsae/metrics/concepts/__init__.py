"""Numbers about single concepts."""
