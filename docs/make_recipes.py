"""Writes docs/reference/recipes.md from recipes' first sentences: ``python docs/make_recipes.py``. A test compares."""

from __future__ import annotations

from pathlib import Path

import yaml

from mmsae.recipes import purpose

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "reference" / "recipes.md"

HEAD = """# Recipes

Written by `python docs/make_recipes.py` from the first sentence of each file. Recipes are YAML files that `-c` reads;
they are looked up in the working folder, then in the installed package, then in the repository. Any dotted option
overrides them, wherever it stands, and `--print_config` prints the whole.

A recipe that says `include: [...]` lies over those it names, which are looked up beside it, then as `-c` does: its
mappings key by key (arguments of a part, unless it names another class), everything else in place of what was there.
So a recipe of your own is what differs:

```yaml
include: [configs/train/paired_topk_store.yaml]
model:
  sae:
    init_args:
      ratio: 16
      selector: {init_args: {k: 64}}
```

Or fragments are put together on the command line, one of an SAE and one of data:

```bash
mmsae fit -c configs/data/synthetic.yaml -c configs/sae/shared_topk.yaml \\
  --model.sae.init_args.ratio 2 --trainer.max_steps 300 --trainer.default_root_dir runs/fragments
```

"""

FOLDERS = {
    "train": "Complete, for `mmsae fit`",
    "smoke": "Complete, on the CPU within seconds",
    "sae": "Fragments: an SAE, its losses, optimiser and schedule",
    "data": "Fragments: where activations come from",
    "run": "Fragments: length, device and validation",
    "world": "Fragments: what recipes of the generated world share",
    "filter": "Jobs over shards, for their command and for `mmsae predict`",
    "steer": "For `mmsae steer`",
    "eval": "For `mmsae evaluate`, `test`, `sweep`, `pope` and `chair`",
}


def table(folder: str) -> str:
    """The recipes of one folder as Markdown."""
    rows = ["| recipe | what it is | includes |", "|---|---|---|"]
    for path in sorted((ROOT / "configs" / folder).glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        parts = ", ".join(f"`{name.removeprefix('../')}`" for name in content.get("include", ()))
        rows.append(f"| `{path.relative_to(ROOT)}` | {purpose(path).replace('|', chr(92) + '|')} | {parts} |")
    if all(row.endswith("|  |") for row in rows[2:]):
        rows = [row.rsplit("|", 2)[0] + "|" for row in rows]
    return "\n".join(rows) + "\n"


def render() -> str:
    """The whole page."""
    return HEAD + "\n".join(f"## {title}\n\n{table(folder)}" for folder, title in FOLDERS.items())


if __name__ == "__main__":
    FILE.write_text(render())
    print(FILE)
