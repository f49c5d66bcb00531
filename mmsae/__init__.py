"""Multimodal sparse autoencoders on vision and vision-language models."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from mmsae import moved

if TYPE_CHECKING:
    from mmsae.load import load_pair
    from mmsae.sae import SAE
    from mmsae.types import Codes, InputError, SAEOutput, Site, Tokens

try:
    __version__ = version("mmsae")
except PackageNotFoundError:  # used from a source folder that was never installed
    __version__ = "0.0.0"

moved.install()

__all__ = ["SAE", "Codes", "InputError", "SAEOutput", "Site", "Tokens", "__version__", "load_pair"]
_WHERE = {"SAE": "sae", "load_pair": "load"}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are used: ``mmsae --help`` need not wait for torch."""
    if name in ("sae", "types"):
        return import_module(f"mmsae.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"mmsae.{_WHERE.get(name, 'types')}"), name)
