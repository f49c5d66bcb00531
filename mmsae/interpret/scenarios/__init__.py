"""Rare and risky situations in a corpus, described by concepts."""
