"""Numbers about single concepts."""

from mmsae.moved import earlier

__getattr__ = earlier(__name__)
