"""Tiny hosts that are trained on the world."""
