"""``mmsae filter``: keep the best image-text pairs, and say why."""
