"""Every notebook, executed top to bottom with its own assertions; and what is committed of their outputs.

The tiny hosts come from a cache that the session fills once (or from ``$MMSAE_CACHE``, where that is set).
"""

import ast
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def run():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "notebooks"))
        import run

        yield run


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSAE_CACHE", os.environ.get("MMSAE_CACHE") or str(tmp_path_factory.mktemp("cache")))
        yield


def cells(path):
    return json.loads(path.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs_and_its_assertions_hold(path, run, cache, tmp_path):
    executed = run.tidy(run.execute(path, tmp_path))
    kinds = {kind for c in executed.cells for o in c.get("outputs", ()) for kind in o.get("data", ())}
    assert "image/png" in kinds
    assert run.machine_paths(executed) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_committed_was_executed_in_order_and_shows_pictures(path, run):
    code = [c for c in cells(path) if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c["outputs"]]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
    assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs)
    assert path.stat().st_size < run.LARGEST


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_asserts_its_figures_and_says_what_to_change_for_a_real_host(path):
    """Names that are set (or functions defined) in the cell after that heading are those that its example sets."""
    found = cells(path)
    last = ast.parse(source(found[-1]))
    assert sum(isinstance(n, ast.Assert) for n in ast.walk(last)) >= 2
    at = [i for i, c in enumerate(found) if source(c).startswith("## What to change for your own")]
    assert len(at) == 1
    example = re.search(r"```python\n(.+?)```", source(found[at[0]]), re.S)[1]

    def names(text):
        body = ast.parse(text).body
        targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
        set_here = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        return set_here | {node.name for node in body if isinstance(node, ast.FunctionDef)}

    assert names(example) == names(source(found[at[0] + 1])) != set()


def test_bars_and_warnings_are_no_output(run):
    from nbformat import v4

    bar = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "  0%|"}
    outputs = [v4.new_output("display_data", bar), v4.new_output("stream", name="stderr", text="  0%|")]
    cell = v4.new_code_cell("1", outputs=[*outputs, v4.new_output("stream", text="said")])
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "widgets": {}}
    tidied = run.tidy(v4.new_notebook(cells=[cell], metadata=kernel))
    assert [o.text for o in tidied.cells[0].outputs] == ["said"] and "widgets" not in tidied.metadata


def test_machine_paths_are_found(run):
    import nbformat

    path = "/" + "home/someone"  # in two parts, since no file of the repository names a machine
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", text=f"wrote {path}/x")])
    assert run.machine_paths(nbformat.v4.new_notebook(cells=[cell])) == [path[:7]]


def test_a_page_lists_them():
    text = (ROOT / "docs" / "how-to" / "notebooks.md").read_text()
    assert NOTEBOOKS and [p.name for p in NOTEBOOKS if f"`notebooks/{p.name}`" not in text] == []


def test_links_between_notebooks_lead_somewhere():
    links = {x for p in NOTEBOOKS for c in cells(p) for x in re.findall(r"\]\(([^)\s]+)\)", source(c))}
    assert [x for x in links if "://" not in x and not (ROOT / "notebooks" / x).exists()] == []


def test_hosts_are_whole_or_absent_and_made_once(tmp_path, monkeypatch):
    """A process that is interrupted leaves nothing under the name; of two at once one makes it."""
    import subprocess

    from mmsae.demo import tiny_hosts
    from mmsae.types import InputError

    monkeypatch.setenv("MMSAE_CACHE", str(tmp_path))

    def fails(target):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_hosts._made("clip", "nothing", 0, fails)
    assert not tiny_hosts.path_of("clip").exists()
    code = """
import sys, time
from mmsae.demo import tiny_hosts
from mmsae.files import atomic_folder
def make(target):
    with atomic_folder(target) as temp:
        time.sleep(1)
        (temp / "made").write_text(sys.argv[1])
    print("WRITTEN")
tiny_hosts._made("clip", "something", 0, make)
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code, name], stderr=subprocess.PIPE, text=True) for name in ("a", "b")
    ]
    said = [p.communicate()[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sum("Making something, once" in s for s in said) == 1 == sum("WRITTEN" in s for s in said)
    assert tiny_hosts.path_of("clip") == tiny_hosts._made("clip", "something", 0, fails)
    tiny_hosts.keep({"clip": tmp_path / "elsewhere"})  # what is there stays
    (tmp_path / "llava").mkdir()
    tiny_hosts.keep({"llava": tmp_path / "llava"})
    assert tiny_hosts.llava() == tiny_hosts.path_of("llava")
    with pytest.raises(InputError, match="no 'sae-x' to be made"):
        tiny_hosts.sae("x")
