"""The algebra of edits, and hosts that run under them."""
