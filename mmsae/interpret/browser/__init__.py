"""A static browser of concepts and samples: ``mmsae explore``."""

from mmsae.lazy import lazy

__all__, __getattr__ = lazy(__name__, {"steered": "read_attributes write_attributes"})
