"""Concept areas in images, and their matching between views."""
