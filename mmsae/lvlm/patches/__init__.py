"""``mmsae patches``: which patches of an image a model needs."""
