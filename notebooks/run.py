"""Execute the notebooks and write their outputs back: ``python notebooks/run.py [01 05 ...]``, or ``make notebooks``.

Each runs in an empty folder of its own, so nothing depends on what an earlier run left, and without sliders, which
would be dead on a page. Tiny hosts come from the cache (``$MMSAE_CACHE``), where they are trained on first use.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LARGEST = 1_500_000  # bytes of a committed notebook
MACHINE = re.compile(r"(?<![\w.}])/(?:home|root|Users|tmp|work|mnt|data|private|var)/[\w.-]")


def notebooks(chosen: list[str] | None = None) -> list[Path]:
    """The notebooks whose names begin with one of ``chosen``; all by default."""
    return [p for p in sorted(HERE.glob("*.ipynb")) if not chosen or p.name.startswith(tuple(chosen))]


def execute(path: Path, folder: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """A notebook, executed in a folder; a cell that fails raises with its traceback."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["MMSAE_WIDGETS"] = "0"  # the kernel inherits it
    where = {"metadata": {"path": folder}}
    return NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources=where, coalesce_streams=True
    ).execute()


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without bars (widgets where a library draws them so), warnings, and times of cells."""
    notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec",)}
    notebook.metadata["language_info"] = {"name": "python"}

    def stays(output: nbformat.NotebookNode) -> bool:
        return output.get("name") != "stderr" and not any("jupyter.widget" in kind for kind in output.get("data", ()))

    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = list(filter(stays, cell.outputs))
    return notebook


def machine_paths(notebook: nbformat.NotebookNode) -> list[str]:
    """Absolute paths of some machine, in sources or text outputs."""
    texts = [c.source for c in notebook.cells]
    for output in (o for c in notebook.cells for o in c.get("outputs", ())):
        texts += [output.get("text", ""), *output.get("traceback", [])]
        texts += [v for kind, v in output.get("data", {}).items() if kind.startswith("text/")]
    return [m[0] for text in texts for m in MACHINE.finditer(text)]


def main(chosen: list[str]) -> None:
    """Execute and write."""
    for path in notebooks(chosen):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = tidy(execute(path, Path(folder)))
        if found := machine_paths(notebook):
            raise SystemExit(f"{path.name} shows paths of this machine: {found}")
        text = nbformat.writes(notebook) + "\n"
        if len(text) > LARGEST:
            raise SystemExit(f"{path.name} would have {len(text):,} bytes, more than {LARGEST:,}: smaller figures")
        path.write_text(text)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {len(text) / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
