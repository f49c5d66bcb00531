"""Numbers about image-text pairs and the two modalities."""

from mmsae.moved import earlier

__getattr__ = earlier(__name__)
