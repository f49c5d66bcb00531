"""``mmsae evaluate``: the benchmark card of an SAE."""
