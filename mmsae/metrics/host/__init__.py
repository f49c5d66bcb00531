"""Numbers about what a host does."""
