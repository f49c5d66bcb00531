"""Where recipes (YAML files) are found, and what they say with the recipes that they include.

They are looked up in the working folder, then in the installed package, then in the repository. ``include:`` at the top
of a recipe names others, as ``-c`` does; they are read first, in order, and the recipe's own lines are laid over them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib import import_module
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
    for root in _roots():
        if (root / inside).is_file():
            return str(root / inside)
    known = sorted({str(p.relative_to(r)) for r in _roots() if r.is_dir() for p in r.rglob("*.yaml")})
    raise InputError(
        f"no recipe {name}: not in the working folder, and mmsae has {', '.join(known) or 'none installed'}"
    )


def _roots() -> list[Path]:
    """Folders of recipes: the installed package's, and the repository's."""
    return [Path(str(files("mmsae"))) / "configs", Path(__file__).parents[1] / "configs"]


def recipes_of(folder: str) -> list[Path]:
    """The recipes of a folder of ``configs`` (``train``), by name."""
    return next((found for r in _roots() if (found := sorted((r / folder).glob("*.yaml")))), [])


def purpose(path: Path) -> str:
    """The first sentence of a recipe's first comment."""
    lines = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))[0].splitlines()
    comment = " ".join(line[1:].strip() for line in lines)
    return re.match(r"(.+?)\.?(?:(?<=\.)\s|$)", comment)[1]


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


def _content(path: str) -> Any:
    """What a file says; None where it cannot be read, for whoever parses it will say why."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def read_recipe(path: str, within: tuple[str, ...] = ()) -> Any:
    """Content of a recipe, which those ``within`` include, laid over what it includes; None where it cannot be read.

    Raises:
        InputError: ``include`` is not a list of recipes, one of them is not found or no mapping, or a recipe includes
            itself.
    """
    content = _content(path)
    if within and not isinstance(content, dict):
        raise InputError(f"{path}, which {within[-1]} includes, is not a mapping in YAML")
    if not isinstance(content, dict) or "include" not in content:
        return content
    names, chain, under = content.pop("include"), (*within, path), {}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: include is {names!r}, not a list of recipes")
    for name in names:
        beside = Path(path).parent / name
        found = str(beside) if beside.is_file() else find_recipe(name)
        if found in chain:
            raise InputError(f"a recipe includes itself: {' -> '.join((*chain, found))}")
        under = laid_over(under, read_recipe(found, chain))
    return laid_over(under, content)


def laid_over(under: Any, over: Any) -> Any:
    """Two configurations as one: mappings key by key, unless they name two classes; else ``over``."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    if "class_path" in over and over["class_path"] != under.get("class_path", over["class_path"]):
        return over
    return under | {key: laid_over(under.get(key), value) for key, value in over.items()}


def instantiate(value: Any) -> Any:
    """What a recipe says, with its mappings of ``class_path`` and ``init_args`` as objects.

    The command lines leave this to jsonargparse, which checks types; a recipe of this package is taken at its word.
    """
    if isinstance(value, list):
        return [instantiate(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {key: instantiate(v) for key, v in value.items()}
    module, _, name = value["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**instantiate(value.get("init_args", {})))


def whole_recipe(path: str) -> str:
    """A recipe as Lightning's command line takes it: its path, or its content where it includes others."""
    content = _content(path)
    return json.dumps(read_recipe(path)) if isinstance(content, dict) and "include" in content else path


def job_of(path: str) -> dict[str, Any] | None:
    """The module that a recipe names for ``mmsae predict``, as ``class_path`` and ``init_args``; None without one."""
    found = read_recipe(path)
    model = found.get("model") if isinstance(found, dict) else None
    return model if isinstance(model, dict) and "class_path" in model else None


def command_recipe(path: str) -> str:
    """A recipe as a plain command takes it: as it is, or the arguments of the job that it names as options."""
    job = job_of(path)
    return whole_recipe(path) if job is None else json.dumps(job.get("init_args") or {})


def each_recipe(args: Sequence[str], change: Callable[[str], str]) -> list[str]:
    """Options with every ``-c RECIPE`` changed."""
    return [change(a) if before in ("-c", "--config") else a for before, a in zip(["", *args], args, strict=False)]


def command_args(args: Sequence[str]) -> list[str]:
    """The options of a plain command, recipes first, each as :func:`command_recipe` reads it."""
    return each_recipe(configs_first(args), command_recipe)
