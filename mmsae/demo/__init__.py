"""``mmsae demo``: the world, its hosts and SAEs, end to end."""
