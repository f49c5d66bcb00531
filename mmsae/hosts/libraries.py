"""Importing the libraries of hosts, at less cost.

torchvision and timm import torch's compiler, and with it sympy and distributed tensors, for functions that matter only
where something is compiled. Half of what ``import open_clip`` takes goes there, and a sixth into looking for cycles in
what imports make.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from mmsae.lazy import uncollected

_COMPILER = "torch._dynamo"


def library(name: str) -> Any:
    """The module ``open_clip``, ``timm`` or another that hosts come from, imported without torch's compiler."""
    if name in sys.modules:
        return sys.modules[name]
    with _lean():
        return import_module(name)


@contextmanager
def _lean() -> Iterator[None]:
    """While open, torch's compiler is imported only for what this module does not know; and no cycles are collected."""
    import torch

    if _COMPILER in sys.modules:
        yield
        return
    compiler, utils = _Absent(_COMPILER), _Absent(f"{_COMPILER}.utils")
    compiler.utils = utils
    sys.modules |= {m.__name__: m for m in (compiler, utils)}
    try:
        with uncollected():
            yield
    finally:
        _forget_absent()
        if vars(torch).get("_dynamo") is compiler:
            del torch._dynamo


def _is_absent(name: str) -> bool:
    """Whether nobody has imported a module, so far."""
    return isinstance(sys.modules.get(name), (_Absent, type(None)))


def _forget_absent() -> None:
    for name in (_COMPILER, f"{_COMPILER}.utils"):
        if _is_absent(name):
            sys.modules.pop(name, None)


class _Absent(ModuleType):
    """Stands for a module of the compiler; what is not known here imports the compiler after all."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        known = {f"{_COMPILER}.disable": _disable, f"{_COMPILER}.utils.is_compile_supported": _is_compile_supported}
        if (full := f"{self.__name__}.{name}") in known:
            return known[full]
        _forget_absent()
        return getattr(import_module(self.__name__), name)


def _is_compile_supported(device_type: str) -> bool:
    return import_module(f"{_COMPILER}.utils").is_compile_supported(device_type)


def _disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
    """``torch.compiler.disable``: what it decorates is left out of compiling, and nothing else changes.

    So it need not be there before something else has imported the compiler.
    """
    if fn is None:
        return functools.partial(_disable, recursive=recursive, **options)

    made: list[Callable] = []

    def disabled() -> Callable:
        if not made:
            _forget_absent()
            made.append(import_module(_COMPILER).disable(fn, recursive, **options))
        return made[0]

    if isinstance(fn, type) or not hasattr(fn, "__code__"):
        return disabled()  # classes and modules are changed in place

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (fn if _is_absent(_COMPILER) else disabled())(*args, **kwargs)

    return call
