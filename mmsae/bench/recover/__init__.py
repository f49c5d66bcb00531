"""``mmsae bench recover``: SAEs on activations whose dictionary and codes are known."""
