"""Edits of SAE codes in a running host, and measurements of what they do."""
