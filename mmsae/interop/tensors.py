"""Tensors of a checkpoint of another library: each is asked for by name, and what nobody asked for is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsae.files import atomic_folder, refuse_foreign
from mmsae.sae import SAE, Dictionary, Normaliser, SAEEncoder, Selector
from mmsae.sae.foreign import read_json, state_of
from mmsae.types import InputError


class Tensors:
    """The tensors of one file, in float32.

    Args:
        file: A ``.safetensors`` file or one of torch.
        state: The tensors, where they are read already.

    Raises:
        InputError: No such file, a damaged one, or one that holds objects of other classes.
    """

    def __init__(self, file: Path, state: Mapping[str, Any] | None = None) -> None:
        self.file = file
        self.state = dict(_state(file) if state is None else state)
        if odd := [n for n, t in self.state.items() if not isinstance(t, Tensor)]:
            raise InputError(f"{file} holds {odd[0]!r}, which is no tensor but {type(self.state[odd[0]]).__name__}")

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor that must be there, of a shape where that is given.

        Raises:
            InputError: It is missing, or has another shape.
        """
        if name not in self.state:
            raise InputError(f"{self.file} has no tensor {name!r}; it has {sorted(self.state)[:8]}")
        value = self.state.pop(name).float()
        if shape and tuple(value.shape) != shape:
            raise InputError(f"{name} in {self.file} has shape {tuple(value.shape)}, {shape} was expected")
        return value

    def pop(self, name: str, *shape: int) -> Tensor | None:
        """A tensor that may be there."""
        return self.take(name, *shape) if name in self.state else None

    def done(self, ignored: tuple[str, ...] = ()) -> None:
        """Refuse what was not asked for, but for names that have no effect on codes.

        Raises:
            InputError: There is such a tensor; it may change what the model computes.
        """
        if left := sorted(set(self.state) - set(ignored)):
            raise InputError(f"{self.file} has tensors that mmsae does not know: {left[:8]}")


def _state(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise InputError(f"no {file.name} in {file.parent}: the weights are missing")
    if file.suffix != ".safetensors":
        return state_of(file)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as e:
        raise InputError(f"{file} is damaged: {e}") from e


class Config:
    """The description of a checkpoint, whose fields are asked for by name.

    Args:
        file: A JSON or YAML file.
        fields: Its contents, where they are read already.
    """

    def __init__(self, file: Path, fields: Mapping[str, Any] | None = None) -> None:
        self.file, self.fields = file, read_json(file) if fields is None else fields

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or the default where the library that wrote it has one."""
        return self.fields.get(name, default)

    def need(self, name: str) -> Any:
        """A field that must be there.

        Raises:
            InputError: It is not.
        """
        if self.fields.get(name) is None:
            raise InputError(f"{self.file} does not say {name}")
        return self.fields[name]

    def only(self, name: str, default: Any, *allowed: Any) -> Any:
        """A field that must have one of the values that mmsae can express.

        Raises:
            InputError: It has another.
        """
        value = self.fields.get(name, default)
        if value not in allowed:
            one = " or ".join(repr(a) for a in allowed)
            raise InputError(f"{self.file} has {name} {value!r}; mmsae reads {one}")
        return value


@contextmanager
def new_folder(folder: str | Path, mark: str) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``folder`` as a whole when the block ends.

    Raises:
        InputError: It holds something else than a checkpoint, which has the file ``mark``.
    """
    refuse_foreign(folder, mark)
    with atomic_folder(folder) as temp:
        yield temp


def whole(value: Any, what: str) -> int:
    """A number of latents, as an int.

    Raises:
        InputError: It is not a whole number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
        raise InputError(f"{what} must be a whole number of at least 1, not {value!r}")
    return int(value)


def at_least(threshold: Tensor) -> Tensor:
    """The largest float32 below each threshold, so that ``u > it`` is the other library's ``u >= threshold``."""
    return torch.nextafter(threshold.float(), torch.tensor(-torch.inf))


def more_than(threshold: Tensor) -> Tensor:
    """The smallest float32 above each threshold, so that the other library's ``u >= it`` is ``u > threshold``."""
    return torch.nextafter(threshold.float(), torch.tensor(torch.inf))


def compose(
    tensors: Mapping[str, Tensor],
    encoder: SAEEncoder,
    selector: Selector | None,
    normaliser: Normaliser | None = None,
    modality: str = "image",
    source: Any = "",
) -> SAE:
    """A one-modality SAE with these parts and tensors, frozen and in eval mode.

    Args:
        tensors: By their names and layouts in an SAE folder: ``W_dec (d_sae, d_in)``, ``b_dec`` or not, the encoder's,
            ``threshold (d_sae,)`` where the selector is JumpReLU.
        encoder: The encoder, not built yet.
        selector: The selector; None with a pursuit.
        normaliser: The normaliser (default: none).
        modality: Name of the modality.
        source: Where the tensors are from, for errors.
    """
    named = dict(tensors)
    d_sae, d_in = named["W_dec"].shape
    norm = "unit" if encoder.is_pursuit else "free"
    if encoder.is_pursuit and not _unit(named["W_dec"]):
        longest = float(named["W_dec"].norm(dim=1).max())
        raise InputError(f"{source}: a pursuit needs atoms of norm 1, those of the file have up to {longest:.4g}")
    dictionary = Dictionary(norm, bias="b_dec" in named)
    parts = {"encoder": encoder, "selector": selector, "normaliser": normaliser}
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: loading draws nothing
        sae = SAE(d_in, d_sae, modalities=(modality,), dictionaries={"shared": dictionary}, **parts)
    if "threshold" in named:
        named["selector.thresholds"] = named.pop("threshold")[None]
    sae.fill_({**sae.named_state(), **named}, source)
    return sae.eval().requires_grad_(False)


def _unit(atoms: Tensor) -> bool:
    return bool(((atoms.norm(dim=1) - 1).abs() < 1e-4).all())
