"""Writes docs/reference/recipes.md from recipes' first sentences: ``python docs/make_recipes.py``. A test compares."""

from __future__ import annotations

from pathlib import Path

import yaml

from mmsae.recipes import purpose, read_recipe

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
    "scale": "Complete, for `mmsae fit` on many GPUs",
    "smoke": "Complete, on the CPU within seconds",
    "sae": "SAEs of the literature as compositions (fragments: parts, losses, optimiser and schedule)",
    "data": "Fragments: where activations come from",
    "run": "Fragments: length, device and validation",
    "world": "Fragments: what recipes of the generated world share",
    "filter": "Jobs over shards, for their command and for `mmsae predict`",
    "interpret": "For `mmsae evidence` and `mmsae predict`",
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


def _named(part: dict | None, default: str, leave_out: tuple[str, ...] = ()) -> str:
    """A part of a composition: its class, and the arguments that say what it is."""
    if part is None:
        return f"`{default}`"
    said = ", ".join(
        f"{k}={v}" for k, v in part.get("init_args", {}).items() if k not in leave_out and type(v) is not dict
    )
    inner = part.get("init_args", {}).get("encoder")
    name = part["class_path"].rpartition(".")[2]
    return f"`{name}`" + (f" of {_named(inner, '')}" if inner else "") + (f" ({said})" if said else "")


def compositions() -> str:
    """Every SAE as what it is composed of; defaults are affine encoder, top-k and one unit-norm dictionary."""
    rows = ["| recipe | what it is | encoder | selector | dictionaries | losses |", "|---|---|---|---|---|---|"]
    for path in sorted((ROOT / "configs" / "sae").glob("*.yaml")):
        model = read_recipe(str(path))["model"]
        parts = model["sae"].get("init_args", {})
        dictionaries = parts.get("dictionaries") or {"shared": None}
        kinds = list(dict.fromkeys(_named(d, "Dictionary") for d in dictionaries.values()))
        several = "one per modality: " if "shared" not in dictionaries else ""
        selector = "–" if "Pursuit" in str(parts.get("encoder")) else _named(parts.get("selector"), "TopK", ("k",))
        losses = " + ".join(_named(t, "", ("coefficient", "target", "dead_after")) for t in model.get("losses", []))
        what, encoder = purpose(path).replace("|", "\\|"), _named(parts.get("encoder"), "AffineEncoder")
        cells = (f"`{path.relative_to(ROOT)}`", what, encoder, selector, several + " and ".join(kinds), losses)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def render() -> str:
    """The whole page."""
    made = {folder: compositions() if folder == "sae" else table(folder) for folder in FOLDERS}
    return HEAD + "\n".join(f"## {title}\n\n{made[folder]}" for folder, title in FOLDERS.items())


if __name__ == "__main__":
    FILE.write_text(render())
    print(FILE)
