"""What an edit changed."""

from mmsae.moved import earlier

__getattr__ = earlier(__name__)
