"""Vision-language models as hosts."""
