"""A static browser of concepts and samples: ``mmsae explore``."""
