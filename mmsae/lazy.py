"""Names of a package that are imported when they are used, so that ``import`` and ``--help`` stay light."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
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
