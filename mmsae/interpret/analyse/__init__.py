"""Data sets by their concepts: ``mmsae analyse``."""
