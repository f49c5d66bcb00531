"""Numbers about image-text pairs and the two modalities."""
