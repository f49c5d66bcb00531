"""Scenes, pictures, captions and shards of the generated world."""
