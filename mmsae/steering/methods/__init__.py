"""Steering methods, one paper one file."""
