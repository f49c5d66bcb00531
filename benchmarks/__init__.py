"""Measurements that docs/results reports, each a command; those of speed share :mod:`benchmarks.measure`."""
