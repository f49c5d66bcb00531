"""The embedded default: a generated image-text world with known concepts, and a tiny CLIP trained on it."""
