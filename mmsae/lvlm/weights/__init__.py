"""``mmsae weights``: cross-modal weights of an SAE on a vision-language model."""
