"""What the documents name exists: links, paths, Python names, recipes, make targets."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmsae.cli import COMMANDS, LIGHTNING, command_parser
from tests.helpers import doc_blocks

ROOT = Path(__file__).parents[1]
PAGES = [doc_blocks.README, ROOT / "CHANGELOG.md", *doc_blocks.DOCS]
PLACES = ("configs", "docs", "mmsae", "datamodules", "tests", "benchmarks", "notebooks")


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=doc_blocks.name)
def test_links_lead_somewhere(page):
    links = [x for x in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in x]
    assert [x for x in links if not (page.parent / x.split("#")[0]).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=doc_blocks.name)
def test_paths_exist(page):
    code = " ".join(re.findall(r"`([^`]+)`", prose(page))) + " " + " ".join(b.text for b in doc_blocks.blocks(page))
    paths = set(re.findall(rf"(?:{'|'.join(PLACES)})/[\w/*.-]*\.(?:py|md|yaml|ipynb|html)\b", code))
    assert [p for p in paths if not list(ROOT.glob(p))] == []


@pytest.mark.parametrize("page", PAGES, ids=doc_blocks.name)
def test_python_names_exist(page):
    names = set(re.findall(r"`((?:mmsae|datamodules)(?:\.\w+)+)[`(]", prose(page)))
    missing = []
    for name in sorted(names - {"mmsae.activations"}):  # the store's format name
        module, attributes = name, []
        while module:
            try:
                found = importlib.import_module(module)
                break
            except ModuleNotFoundError:
                module, _, last = module.rpartition(".")
                attributes.insert(0, last)
        for attribute in attributes:
            found = getattr(found, attribute, None)
        if found is None:
            missing.append(name)
    assert missing == []


def rendered(script):
    """What a script of docs/ writes, made in a process of its own."""
    code = f"import {script}; print({script}.render(), end='')"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "docs"), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


def test_the_page_of_commands_is_the_code():
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert rendered("make_cli") == page, "docs/reference/cli.md is out of date: python docs/make_cli.py"
    assert all(f"## mmsae {name}\n" in page for name in COMMANDS) and ", ".join(LIGHTNING) in page
    empty = [line for line in page.splitlines() if re.match(r"\| `[^`]+` \|\s*\|", line)]
    assert empty == []


def test_the_page_of_recipes_is_the_recipes():
    page = (ROOT / "docs" / "reference" / "recipes.md").read_text()
    assert rendered("make_recipes") == page, "docs/reference/recipes.md is out of date: python docs/make_recipes.py"
    recipes = [p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml")]
    assert len(recipes) > 30 and [r for r in recipes if f"`{r}`" not in page] == []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """Broken links, headings that are not there, pages that nothing leads to, docstrings that do not parse."""
    args = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*args, str(ROOT / "docs"), str(tmp_path / "site")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("index", "reference/api/mmsae.sae"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
    reference = (tmp_path / "site" / "reference" / "api" / "mmsae.sae.html").read_text()
    assert 'id="mmsae.sae.TopK"' in reference and "mmsae.sae.Normaliser" in reference


def test_every_folder_of_the_package_has_a_reference():
    code = "import conf; print(*conf.PACKAGES)"
    pages = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True
    ).stdout.split()
    folders = {p.parent.name for p in (ROOT / "mmsae").glob("*/__init__.py")} - {"demo", "bench"}
    assert {p.removeprefix("mmsae.") for p in pages} - {"mmsae", "datamodules"} == folders


def test_make_demo_is_the_documented_command():
    """``tests/demo/test_command.py`` runs it with the tiny profile."""
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^demo:.*\n\t(.+)$", makefile, re.M)[1]
    assert recipe == "$(BIN)/mmsae demo --out runs/demo"
    assert command_parser("demo")[0].parse_args(recipe.split()[2:]).profile == "default"
    assert re.search(r"^test:.*\n\t.*-m pytest", makefile, re.M)
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(), re.M)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
