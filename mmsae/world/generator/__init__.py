"""Scenes, images, captions and shards of the generated world."""
