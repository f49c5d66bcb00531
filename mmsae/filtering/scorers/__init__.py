"""How pairs are scored, by kind of host."""
