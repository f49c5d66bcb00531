"""``mmsae look``: from a folder of photographs to the browser of their concepts."""
