"""Activations of generations, as a stream."""
