"""Who may import whom, read from import statements and from class_path strings."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"types", "files", "fingerprint", "__version__"}  # shapes, whole files, a hash, a word
ALLOWED = {
    # Codes.decode_with is the one upward import: a method of a shape that everything passes around
    "types": {"kernels"},
    "files": {"types"},
    "recipes": {"types"},
    "threads": {"types"},
    "kernels": BASE,
    "sae": BASE | {"kernels"},
    "interop": BASE | {"sae"},
    "shards": BASE,
    "backbones": BASE,
    "cache": BASE | {"shards", "backbones"},
    "metrics": BASE | {"sae", "kernels"},
    "training": BASE | {"sae", "metrics", "kernels", "recipes", "threads"},
    "tasks": BASE | {"sae", "kernels", "shards", "backbones", "cache", "metrics"},
    "steering": BASE | {"sae", "kernels", "shards", "backbones", "cache", "metrics", "tasks"},
    "heads": BASE | {"sae", "kernels", "shards", "backbones", "cache", "metrics", "tasks"},
    "interpret": BASE
    | {"recipes", "sae", "kernels", "shards", "backbones", "cache", "metrics", "tasks", "steering", "heads"},
    "world": BASE | {"shards", "backbones", "metrics", "tasks", "steering", "heads"},
    "datamodules": BASE | {"shards", "cache", "backbones", "world"},
}
DEMO = {
    "demo",
    "demo_card",
    "demo_filter",
    "demo_diffusion",
    "demo_drawing",
    "demo_llava",
    "demo_ood",
    "demo_process",
    "demo_report",
    "demo_stages",
    "demo_uses",
}
EVERYTHING = DEMO | {"bench", "bench_report", "bench_scores", "cli", "info", "options", "tiny_hosts", "__init__"}
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
            if node.module == "mmsae":
                yield from (f"mmsae.{a.name}" for a in node.names)


def strings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\b(?:mmsae|datamodules)(?:\.\w+)+", node.value)


PUBLIC_ROOT = {"mmsae.SAE", "mmsae.Codes", "mmsae.InputError", "mmsae.SAEOutput", "mmsae.Site", "mmsae.Tokens"}


@pytest.mark.parametrize(("path", "layer"), list(modules()), ids=lambda v: v.name if isinstance(v, Path) else v)
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
        assert target == layer or target in ALLOWED[layer], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(("path", "layer"), list(modules()), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_only_demo_and_cli_name_datamodules(path, layer):
    if layer not in NAMES_DATAMODULES | {"datamodules"}:
        named = [s for s in strings(path) if s.startswith("datamodules.") and not s.startswith("datamodules.py")]
        assert not named, f"{path.relative_to(ROOT)} names {named}"


def test_importing_mmsae_is_light():
    import subprocess
    import sys

    heavy = ("lightning", "transformers", "open_clip", "diffusers", "pandas", "matplotlib", "webdataset")
    code = f"import sys, mmsae; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_package_list_is_complete():
    tomllib = pytest.importorskip("tomllib")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"mmsae", "datamodules", "mmsae.configs"}
    found |= {f"mmsae.{p.parent.name}" for p in (ROOT / "mmsae").glob("*/__init__.py")}
    assert listed == found
