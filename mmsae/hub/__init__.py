"""SAEs on the Hugging Face hub: ``mmsae push`` and ``mmsae pull``."""
