"""LightningDataModules: thin wrappers over ``mmsae.shards`` and ``mmsae.activations``."""

from datamodules.cached import CachedActivations
from datamodules.generation import GenerationDataModule
from datamodules.image_text import ImageTextDataModule
from datamodules.streaming import StreamingActivations
from datamodules.synthetic import SyntheticDictionary

__all__ = [
    "CachedActivations",
    "GenerationDataModule",
    "ImageTextDataModule",
    "StreamingActivations",
    "SyntheticDictionary",
]
