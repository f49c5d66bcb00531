"""Other libraries' checkpoints."""

from mmsae.interop.convert import convert, load

__all__ = ["convert", "load"]
