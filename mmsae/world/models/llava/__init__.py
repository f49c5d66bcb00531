"""A tiny LLaVA."""
