"""Any ``nn.Module`` as a host, by a function of the user's: ``module:IMPORT.PATH:FUNCTION``.

The function takes the host's options, if any, and returns the model and what turns a PIL image into its input, or a
:class:`~mmsae.hosts.base.Host` of its own. Naming one runs its code, so such a name is taken from the user alone and
never from a file that came with an SAE (:func:`mmsae.hosts.names.trusted`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmsae.hosts.base import Host
from mmsae.hosts.encoders.encoder import Encoder
from mmsae.hosts.hooks import ModulePort, Port, unwrap
from mmsae.hosts.names import reason
from mmsae.types import IMAGE, InputError


class ModuleHost(Encoder):
    """A frozen model of images, of which nothing else is known.

    ``image.embed`` is what it returns: ``(B, d)``, or ``(B, T, d)`` or ``(B, d, H, W)``, of which the mean is taken (of
    a container, the first tensor). All tokens of its sites are patches.

    Args:
        model: Takes a batch of what ``preprocess`` gives.
        preprocess: PIL image to a tensor, of one shape for all images.
        hint: How to load it again.
        device: Device that it runs on.
        precision: ``fp32``, or autocast ``bf16`` / ``fp16``.

    Raises:
        InputError: ``preprocess`` gives tensors of several shapes, or none.
    """

    modalities = (IMAGE,)

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Image.Image], Tensor],
        hint: str = "",
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ) -> None:
        self._preprocess = preprocess
        made = [preprocess(Image.new("RGB", size)) for size in ((64, 48), (48, 64))]
        if not all(isinstance(x, Tensor) for x in made) or made[0].shape != made[1].shape:
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in made]
            raise InputError(f"host {hint}: preprocessing gives {shapes[0]} and {shapes[1]} of two images, no batch.")
        self._blank = made[0]
        super().__init__(model, hint, device, precision)

    def config(self) -> dict[str, Any]:
        """The forms of model and preprocessing, without where they lie in memory; code is not looked at."""
        how = repr(self._preprocess)
        if " at 0x" in how:
            how = getattr(self._preprocess, "__qualname__", type(self._preprocess).__qualname__)
        return {"model": repr(self.model), "preprocess": how, "shape": list(self._blank.shape)}

    def transform(self, train: bool = False) -> Callable[[Image.Image], Tensor]:
        """The user's preprocessing; ``train`` changes nothing."""
        return self._preprocess

    def probe_input(self, modality: str, n: int) -> Tensor:
        return self._blank.new_zeros(n, *self._blank.shape)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        out = unwrap(self.model(x))
        if out.ndim not in (2, 3, 4):
            raise InputError(f"host {self.hint}: the model returns {tuple(out.shape)}, not (B, d), tokens or a map.")
        return out if out.ndim == 2 else out.mean(1) if out.ndim == 3 else out.mean((2, 3))

    @cached_property
    @torch.no_grad()
    def _is_embedding(self) -> bool:
        """Whether the model returns embeddings, as they are."""
        with self.unseen():
            return unwrap(self.model(self.probe_input(IMAGE, 1).to(self.device))).ndim == 2

    def endpoint(self, name: str) -> Port:
        return ModulePort(self.model) if self._is_embedding else super().endpoint(name)


@contextmanager
def _working_folder() -> Iterator[None]:
    """The folder that the user works in is looked in last, as for ``python -m``."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def load_function(name: str, what: str) -> Callable[..., Any]:
    """The user's function.

    Args:
        name: ``IMPORT.PATH:FUNCTION``.
        what: The host's name, for messages.

    Raises:
        InputError: There is none, or its file cannot be run.
    """
    path, _, function = name.partition(":")
    with _working_folder():
        try:
            module = import_module(path)
        except Exception as e:  # a user's file may raise what it likes
            raise InputError(f"host {what!r}: {path} cannot be imported: {reason(e)}") from e
    if not callable(found := getattr(module, function, None)):
        raise InputError(f"host {what!r}: {path} ({module.__file__}) has no function {function}.")
    return found


def load_module(name: str, hint: str, device: str | torch.device, precision: str, **options: Any) -> Host:
    """The host that the user's function makes.

    Args:
        name: ``IMPORT.PATH:FUNCTION``.
        hint: The host's whole name.
        device: Device that it runs on.
        precision: ``fp32``, or autocast ``bf16`` / ``fp16``.
        **options: Arguments of the function.

    Raises:
        InputError: The function is not there, fails, or returns something else.
    """
    function = load_function(name, hint)
    with _working_folder():
        try:
            made = function(**options)
        except InputError:
            raise
        except Exception as e:
            raise InputError(f"host {hint!r}: {name} failed: {reason(e)}") from e
    if isinstance(made, Host):
        made.hint, made.precision = hint, precision
        return made.to(device)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        given = f"a {type(made).__name__}" if not isinstance(made, tuple) else f"{len(made)} values"
        raise InputError(
            f"host {hint!r}: {name} returned {given}; it has to return an nn.Module and a function that turns a PIL "
            "image into its input, or a Host."
        )
    return ModuleHost(*made, hint, device, precision)
