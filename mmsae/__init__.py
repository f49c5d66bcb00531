"""Multimodal sparse autoencoders on vision and vision-language models."""
