"""A tiny Stable Diffusion."""
