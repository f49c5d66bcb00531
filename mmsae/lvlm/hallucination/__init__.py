"""``mmsae pope`` and ``mmsae chair``: objects that are not in the image."""
