"""Concepts and a tree of classes."""
