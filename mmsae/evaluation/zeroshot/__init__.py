"""``mmsae zeroshot``: classification by class names."""
