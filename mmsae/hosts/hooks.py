"""Where one tensor of a frozen host is read or replaced; nothing here knows which host it is.

A *port* names one tensor. ``port.attach(fn)`` is a context manager: while it is open, the host's tensor goes through
``fn(tensor) -> tensor`` every time the host computes it. Returning the very same object leaves the host's own object
(tuple, ModelOutput, strides and all) untouched. Functions attached later see what earlier ones returned, and everything
is gone when the context closes, also after an exception.

Modules output tensors, tuples or ModelOutputs; :func:`unwrap` and :func:`rewrap` are the one place that knows.
Some tensors are no module's output or input (CLIP multiplies by a bare Parameter): those are reached by shadowing one
attribute of the module that uses them, see :class:`Shadow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsae.types import InputError

TensorEdit = Callable[[Tensor], Tensor]

_KEYS = ("last_hidden_state", "hidden_states", "sample")  # where ModelOutputs of transformers and diffusers keep x


def _slot(output: Any) -> Any:
    """Key or index of the main tensor in a container; raises InputError if it holds none."""
    items: list[tuple[Any, Any]] = []
    if isinstance(output, Mapping):
        items = [(k, output[k]) for k in _KEYS if k in output] + list(output.items())
    elif isinstance(output, (tuple, list)):
        items = list(enumerate(output))
    for key, value in items:
        if isinstance(value, Tensor):
            return key
    raise InputError(f"a module that returns {type(output).__name__} without a tensor in it cannot be a site.")


def unwrap(output: Any, key: Any = None) -> Tensor:
    """The main tensor of a module's output, or that at ``key``: itself, a tuple's first, or a ModelOutput's state."""
    return output if isinstance(output, Tensor) else output[_slot(output) if key is None else key]


def rewrap(output: Any, new: Tensor, key: Any = None) -> Any:
    """``output`` with its main tensor (or that at ``key``) replaced; the same object if ``new`` is that tensor."""
    if isinstance(output, Tensor):
        return new
    key = _slot(output) if key is None else key
    if output[key] is new:
        return output
    if isinstance(output, Mapping):
        return type(output)(**{**output, key: new})
    items = [new if i == key else v for i, v in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def first_input(args: tuple, kwargs: dict) -> tuple[int | str, Tensor]:
    """Where the hidden state is among a module's arguments, and the tensor."""
    named: list[tuple[Any, Any]] = [*enumerate(args), *((k, kwargs[k]) for k in _KEYS if k in kwargs), *kwargs.items()]
    for where, value in named:
        if isinstance(value, Tensor):
            return where, value
    raise InputError("a module that is called without a tensor cannot be a site with io 'in' or 'update'.")


class ModulePort(NamedTuple):
    """The input, the output or the update (output minus input) of a module."""

    module: nn.Module  #: The host's module.
    #: ``in``, ``out`` or ``update``. Replacing an update ``u`` by ``v`` makes the output ``out + (v - u)``.
    io: str = "out"
    #: Which element of a returned container, where it is not the first tensor (blocks of diffusion transformers return
    #: text before image).
    key: Any = None

    @contextmanager
    def attach(self, fn: TensorEdit) -> Iterator[None]:
        """Send the tensor through ``fn`` while the context is open."""
        held: list[Tensor] = []

        def before(_: nn.Module, args: tuple, kwargs: dict) -> Any:
            where, x = first_input(args, kwargs)
            if self.io == "update":
                held[:] = [x.clone()]  # the module may work in place on its input
                return None
            new = fn(x)
            if new is x:
                return None
            if isinstance(where, int):
                return (*args[:where], new, *args[where + 1 :]), kwargs
            return args, {**kwargs, where: new}

        def after(_: nn.Module, args: tuple, output: Any) -> Any:
            x = out = unwrap(output, self.key)
            if self.io == "update":
                start = held.pop()
                if start.shape != out.shape:
                    shapes = f"its input has shape {tuple(start.shape)} and its output {tuple(out.shape)}"
                    raise InputError(f"a module cannot be a site with io 'update' when {shapes}.")
                x = out - start
            new = fn(x)
            if new is x:
                return None
            return rewrap(output, out + (new - x) if self.io == "update" else new, self.key)

        with ExitStack() as stack:
            if self.io != "out":
                stack.enter_context(self.module.register_forward_pre_hook(before, with_kwargs=True))
            if self.io != "in":
                stack.enter_context(self.module.register_forward_hook(after))
                _recorders_last(self.module)
            yield


def _recorders_last(module: nn.Module) -> None:
    """Let the hooks by which transformers collects ``hidden_states`` see what edits return, not what they are given.

    They stay on a module once they were asked for, so they may be older than an edit; a pipeline that reads
    ``hidden_states[-2]`` (SDXL, LLaVA) would never see it.
    """
    for key, hook in list(module._forward_hooks.items()):
        if "output_capturing_hook" in getattr(hook, "__qualname__", ""):
            module._forward_hooks.move_to_end(key)


class Shadow:
    """Stands in for one attribute of a module while somebody is attached.

    It is put into the module's ``__dict__``, which Python looks up before parameters, submodules and methods: the
    Parameter itself, ``state_dict`` and ``forward`` of the class stay as they are.
    """

    def __init__(self, original: Any, before: Any):
        self.original, self.before, self.fns = original, before, []

    def run(self, x: Tensor) -> Tensor:
        """``x`` through all attached functions, oldest first."""
        for fn in tuple(self.fns):
            x = fn(x)
        return x


class ProjectionShadow(Shadow):
    """Stands in for a Parameter that the host uses as ``pooled @ parameter``; the functions see ``pooled``."""

    def __rmatmul__(self, pooled: Tensor) -> Tensor:
        return self.run(pooled) @ self.original


class EncodeShadow(Shadow):
    """Stands in for a method ``encode(x, normalize=False)``; the functions see the embedding before normalisation."""

    def __call__(self, x: Tensor, normalize: bool = False) -> Tensor:
        out = self.run(self.original(x))
        return F.normalize(out, dim=-1) if normalize else out


class ShadowPort(NamedTuple):
    """A tensor that is reached through an attribute of a module."""

    owner: nn.Module  #: The module.
    name: str  #: Name of its attribute.
    kind: type[Shadow]  #: Which :class:`Shadow` stands in for it.

    @contextmanager
    def attach(self, fn: TensorEdit) -> Iterator[None]:
        """Send the tensor through ``fn`` while the context is open."""
        room = self.owner.__dict__
        shadow = room.get(self.name)
        if not isinstance(shadow, Shadow):
            shadow = room[self.name] = self.kind(getattr(self.owner, self.name), shadow)
        shadow.fns.append(fn)
        try:
            yield
        finally:
            shadow.fns.remove(fn)
            if not shadow.fns:
                del room[self.name]
                if shadow.before is not None:
                    room[self.name] = shadow.before


class CallPort(NamedTuple):
    """A tensor that a host itself sends through the functions of a list, oldest first."""

    fns: list[TensorEdit]  #: The host's list.

    @contextmanager
    def attach(self, fn: TensorEdit) -> Iterator[None]:
        """Send the tensor through ``fn`` while the context is open."""
        self.fns.append(fn)
        try:
            yield
        finally:
            self.fns.remove(fn)


Port = ModulePort | ShadowPort | CallPort


@contextmanager
def watch_input(module: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Keep the module's latest first argument (token ids, say) in ``seen[0]`` while the context is open."""

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen[:] = [first_input(args, kwargs)[1]]

    with module.register_forward_pre_hook(before, with_kwargs=True):
        yield


class Done(Exception):
    """Raised inside a forward pass when everything that was wanted has been read; the rest need not be computed."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The autocast context of ``bf16`` or ``fp16``; ``fp32`` also turns off the caller's autocast."""
    if device.type == "meta":
        return nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
