"""Multimodal sparse autoencoders on vision and vision-language models."""

from importlib.metadata import PackageNotFoundError, version

from mmsae.sae import SAE
from mmsae.types import Codes, InputError, SAEOutput, Site, Tokens

try:
    __version__ = version("mmsae")
except PackageNotFoundError:  # used from a source folder that was never installed
    __version__ = "0.0.0"

__all__ = ["SAE", "Codes", "InputError", "SAEOutput", "Site", "Tokens", "__version__"]
