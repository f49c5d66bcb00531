"""Who may import whom, read from import statements and from class_path strings; and that the tests mirror the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# shapes, errors, whole files, sorted ones, a hash, options, a word, names on demand, numbers that pass without waiting
BASE = {
    "types",
    "errors",
    "files",
    "partitions",
    "fingerprint",
    "allocator",
    "options",
    "moved",
    "lazy",
    "device",
    "__version__",
}
MODELS = BASE | {"load", "kernels", "sae", "remote", "shards", "jobs", "hosts", "activations", "metrics", "report"}
ALLOWED = {
    # Codes.decode_with is the one upward import: a method of a shape that everything passes around
    "errors": set(),
    "types": {"errors", "kernels"},
    "files": {"errors"},
    "partitions": {"files"},
    "allocator": set(),
    "recipes": {"errors"},
    "options": {"errors", "hosts"},  # hosts within one function: how options of a host become part of its name
    "moved": {"errors"},
    "device": set(),
    "lazy": set(),
    "kernels": BASE,
    "sae": BASE | {"kernels", "remote"},
    "interop": BASE | {"sae", "remote"},
    "hub": BASE | {"sae", "remote", "report"},
    "remote": BASE,
    "shards": BASE | {"remote"},
    "jobs": BASE | {"shards"},
    "hosts": BASE | {"remote"},  # whether there is a hub
    "load": BASE | {"sae", "hosts"},
    "activations": BASE | {"shards", "hosts", "jobs"},
    "metrics": BASE | {"sae", "kernels"},
    "training": BASE | {"sae", "metrics", "kernels", "recipes", "jobs", "report"},
    "report": BASE | {"kernels", "metrics"},
    "lvlm": MODELS,
    "filtering": MODELS | {"lvlm"},
    "evaluation": MODELS | {"recipes", "interop"},
    "steering": MODELS,
    "interpret": MODELS | {"lvlm", "filtering", "evaluation", "steering"},
    "world": MODELS | {"lvlm", "filtering", "evaluation", "steering"},
    "datamodules": BASE | {"shards", "activations", "hosts", "world"},
}
EVERYTHING = {"demo", "bench", "look", "cli", "__main__", "info", "__init__"}
NAMES_DATAMODULES = {"demo", "cli"}


def modules():
    for path in sorted([*(ROOT / "mmsae").rglob("*.py"), *(ROOT / "datamodules").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, "datamodules" if parts[0] == "datamodules" else parts[1]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


def strings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\b(?:mmsae|datamodules)(?:\.\w+)+", node.value)


PUBLIC_ROOT = {f"mmsae.{n}" for n in ("SAE", "Codes", "InputError", "SAEOutput", "Site", "Tokens", "load_pair")}


def named(value):
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else value


@pytest.mark.parametrize(("path", "layer"), list(modules()), ids=named)
def test_imports_follow_the_directions(path, layer):
    names = set(imported(path))
    if layer != "datamodules":
        assert not any(n.split(".")[0] == "datamodules" for n in names), "nothing in mmsae imports datamodules"
    if layer in EVERYTHING:
        return
    for name in names:
        if name.split(".")[0] != "mmsae" or name == "mmsae" or name in PUBLIC_ROOT:
            continue
        target = name.split(".")[1]
        allowed = target == layer or target in ALLOWED[layer]
        assert allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(("path", "layer"), list(modules()), ids=named)
def test_only_demo_and_cli_name_datamodules(path, layer):
    if layer not in NAMES_DATAMODULES | {"datamodules"}:
        named = [s for s in strings(path) if s.startswith("datamodules.") and not s.startswith("datamodules.py")]
        assert not named, f"{path.relative_to(ROOT)} names {named}"


def circles(arrows):
    """The sets of names that reach each other: strongly connected components of more than one name."""
    order, low, stack, found = {}, {}, [], []

    def visit(name):
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in arrows[name]:
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            found.extend([sorted(part)] if len(part) > 1 else [])

    for name in arrows:
        if name not in order:
            visit(name)
    return found


def test_the_finder_of_circles():
    assert circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["a"]}) == [["b", "c"]]
    assert circles({"a": ["b"], "b": ["c"], "c": []}) == []


def test_no_imports_go_in_circles():
    """Imports for type checkers and within functions count: who reads one file of a circle has to read all of them."""
    paths = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in [*(ROOT / "mmsae").rglob("*.py"), *(ROOT / "datamodules").rglob("*.py")]
    }
    packages = {n for n, p in paths.items() if p.stem == "__init__"}
    arrows = {}
    for name, path in paths.items():
        if name not in packages:  # a package's own file gathers names; what it gathers stands alone
            arrows[name] = sorted({n for n in imported(path) if n in paths and n not in packages and n != name})
    assert circles(arrows) == []


def test_tests_mirror_the_code():
    """``tests/A/test_B.py`` or ``tests/A/test_B_aspect.py`` is about ``mmsae/A/B.py``."""
    modules = [p.relative_to(ROOT / "mmsae").with_suffix("").as_posix() for p in (ROOT / "mmsae").rglob("*.py")]
    modules += [f"datamodules/{p.stem}" for p in (ROOT / "datamodules").glob("*.py")]
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder, stem = path.relative_to(ROOT / "tests").parent.as_posix(), path.stem.removeprefix("test_")
        if folder not in (".", "before"):
            about = f"{folder}/{stem}"
            assert any(about == m or about.startswith(f"{m}_") for m in modules), f"{named(path)}: no mmsae/{about}.py"


def test_importing_mmsae_is_light():
    heavy = ("lightning", "transformers", "open_clip", "diffusers", "pandas", "matplotlib", "webdataset")
    code = f"import sys, mmsae; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_package_list_is_complete():
    tomllib = pytest.importorskip("tomllib")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"mmsae", "datamodules", "mmsae.configs"}
    found |= {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "mmsae").glob("**/*/__init__.py")}
    assert listed == found
