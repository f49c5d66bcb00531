"""Imports at less cost: names of a package when they are used, and large libraries without a search for cycles."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def lazy(package: str, modules: Mapping[str, str]) -> tuple[list[str], Callable[[str], Any]]:
    """``__all__`` and ``__getattr__`` of a package.

    A name that a module of the package has, too, stays what the package gives, also when that module is imported.

    Args:
        package: Its ``__name__``.
        modules: ``{module below it: "names that it gives, in one string"}``.
    """
    home = {name: f"{package}.{module}" for module, names in modules.items() for name in names.split()}

    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            """Not the module of a name, which the import system sets on the package when it is imported."""
            if not (name in home and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *home})

    def get(name: str) -> Any:
        if name in home:
            return getattr(import_module(home[name]), name)
        if name.isidentifier() and not name.startswith("_") and find_spec(f"{package}.{name}"):
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    sys.modules[package].__class__ = Package
    return sorted(home), get


@contextmanager
def uncollected() -> Iterator[None]:
    """While open, no cycles are looked for: imports make hundreds of thousands of objects that stay.

    Each search walks over them, which is a tenth to a sixth of what importing torch or open_clip takes.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def torch_for_good() -> None:
    """Import torch for the beginning of a command, never of a library: no later search for cycles walks over it."""
    if "torch" in sys.modules:
        return
    with uncollected():
        import_module("torch")
        gc.freeze()
