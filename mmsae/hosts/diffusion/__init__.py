"""Text-to-image pipelines as hosts."""
