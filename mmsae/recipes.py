"""Where recipes (YAML files) are found: the working folder, then the installed package, then the repository."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmsae.errors import InputError


def find_recipe(name: str) -> str:
    """Path of a recipe named as a path (``configs/train/vl_sae_store.yaml``).

    Raises:
        InputError: None of the places has it (the message lists near names), or it is not UTF-8.
    """
    if Path(name).exists():
        return _utf8(name)
    inside = Path(*[p for p in Path(name).parts if p not in ("configs", ".")] or ["."])
    roots = [Path(str(files("mmsae"))) / "configs", Path(__file__).parents[1] / "configs"]
    for root in roots:
        if (root / inside).is_file():
            return str(root / inside)
    known = sorted({str(p.relative_to(r)) for r in roots if r.is_dir() for p in r.rglob("*.yaml")})
    raise InputError(
        f"no recipe {name}: not in the working folder, and mmsae has {', '.join(known) or 'none installed'}"
    )


def _utf8(path: str) -> str:
    """The path, if its content is what YAML's readers take."""
    try:
        if Path(path).is_file():
            Path(path).read_bytes().decode()
    except UnicodeDecodeError as e:
        raise InputError(f"{path} cannot be read: byte {e.start} is not UTF-8 text; save it as UTF-8") from e
    return path


def configs_first(args: Sequence[str]) -> list[str]:
    """The options of a command with every ``-c RECIPE`` in front, found and resolved.

    So options override recipes wherever they stand; what stood before ``-c`` would be overridden without a word.
    """
    recipes, options = [], []
    at = iter(args)
    for value in at:
        if value in ("-c", "--config"):
            name = next(at, None)
            recipes += [value] if name is None else [value, find_recipe(name)]
        elif value.startswith("--config="):
            recipes += ["--config", find_recipe(value.split("=", 1)[1])]
        else:
            options.append(value)
    return recipes + options


def job_of(path: str) -> dict[str, Any] | None:
    """The module that a recipe names for ``mmsae predict``, as ``class_path`` and ``init_args``; None without one."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # whoever parses it will say what is wrong
    model = found.get("model") if isinstance(found, dict) else None
    return model if isinstance(model, dict) and "class_path" in model else None


def command_recipe(path: str) -> str:
    """A recipe as a plain command takes it: its path, or the arguments of the job that it names as options."""
    job = job_of(path)
    return path if job is None else json.dumps(job.get("init_args") or {})


def command_args(args: Sequence[str]) -> list[str]:
    """The options of a plain command, recipes first, each as :func:`command_recipe` reads it."""
    args = configs_first(args)
    return [
        command_recipe(a) if before in ("-c", "--config") else a for before, a in zip(["", *args], args, strict=False)
    ]
