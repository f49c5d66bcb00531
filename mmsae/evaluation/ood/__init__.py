"""``mmsae ood``: detection of images unlike the training ones."""
