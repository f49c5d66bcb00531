"""Writes docs/reference/cli.md from commands and classes: ``python docs/make_cli.py``. A test compares."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

import datamodules
import mmsae.sae
from mmsae import SAE
from mmsae.cli import COMMANDS, command_parser
from mmsae.options import add_group
from mmsae.training import LitSAE, Schedule
from mmsae.training.callbacks import DeadLatentReport, ExportSAE
from mmsae.training.checkpoint import RunCheckpoint
from mmsae.training.members.options import Members

FILE = Path(__file__).with_name("reference") / "cli.md"
NOT_OPTIONS = ("help", "config", "print_config")

HEAD = """# Commands

Written by `python docs/make_cli.py` from the code; `mmsae COMMAND --help` says the same.

`mmsae --help` lists the commands, `mmsae --version` prints the version. Wrong input ends with one sentence on standard
error and exit code 2; with `MMSAE_TRACEBACK=1` in the environment it shows where it came from, too. Options of the
plain commands are written with dashes (`--image-size`; underscores, as in YAML and Python, are understood too); `-c
FILE` reads any of them from YAML and `--print_config` prints them as YAML. A flag alone means `true`. An option that
takes several values takes them one after the other (`--shards A B`, or an unquoted glob), again and again (`--shards A
--shards B`) or as a list (`--shards "[A, B]"`; in YAML one value or a list). Recipes are looked up in the working
folder, then in the installed package, then in the repository.

"""

FIT = """## mmsae fit, validate, test, predict

Lightning's command line around `LitSAE` and a datamodule, from a recipe and any dotted option:

```bash
mmsae fit -c configs/smoke/paired_topk.yaml --trainer.default_root_dir runs/smoke
mmsae validate -c configs/smoke/paired_topk.yaml --trainer.default_root_dir runs/smoke --ckpt_path last
```

`-c` may be given several times; later files and options win. `--ckpt_path last` goes on with the run in
`--trainer.default_root_dir`, or starts it where there is none; options that disagree with the checkpoint are refused.
On SIGTERM a checkpoint is written and the exit code is 143. `--data.NAME` is short for `--data.init_args.NAME`.
`mmsae fit --help` shows what most runs need, `mmsae fit --help all` everything, Lightning's options of `--trainer` too;
mmsae changes these of its defaults: `max_epochs` -1 (give `max_steps`), `num_sanity_val_steps` 0, `default_root_dir`
runs/fit, no model summary, CSV and TensorBoard logs in `RUN/logs`. In YAML and `--...help CLASS` a part is named by its
class path, as below. `--threads` is the number of CPU threads of each process.

"""


def options(parser: ArgumentParser) -> Iterator[tuple[str, str, str]]:
    """``(name, explanation, default)`` of every option of a parser."""
    defaults = parser.get_defaults()
    for action in parser._actions:
        names = [s for s in action.option_strings if not s.endswith("+")]
        if action.dest in NOT_OPTIONS or action.dest.endswith(".help") or (not names and not action.required):
            continue
        name = names[0] if names else action.dest
        default = "required" if action.required else shown(defaults.get(action.dest))
        yield name, " ".join(str(action.help or "").split()), default


def shown(value: Any) -> str:
    """A default as it would stand in YAML."""
    if hasattr(value, "class_path") or (isinstance(value, dict) and "class_path" in value):
        return value["class_path"]
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False, default=str)


def table(rows: Iterator[tuple[str, str, str]]) -> str:
    """Markdown; bars inside cells are escaped, and Sphinx roles become plain code."""
    lines = ["| option | meaning | default |", "|---|---|---|"]
    for name, text, default in rows:
        text = text.replace("|", "\\|").replace(":func:", "").replace(":meth:", "").replace("``", "`")
        lines.append(f"| `{name}` | {text} | {default if default == 'required' else f'`{default}`'} |")
    return "\n".join(lines) + "\n"


def class_section(cls: Callable, prefix: str, name: str, level: str = "####") -> str:
    """One class: its summary and its arguments, written as options under ``prefix``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, prefix or None, as_group=False, fail_untyped=False)
    rows = [(n.removeprefix("--") if not prefix else n, t, d) for n, t, d in options(parser)]
    summary = (cls.__doc__ or "").strip().split("\n\n")[0].split("\n")[0].rstrip(".").replace("``", "`")
    body = table(iter(rows)) if rows else "No arguments.\n"
    return f"{level} {name}\n\n{summary}.\n\n{body}\n"


def render() -> str:
    """The whole page."""
    out = HEAD
    for name, command in COMMANDS.items():
        out += f"## mmsae {name}\n\n{command.summary[0].upper()}{command.summary[1:]}.\n\n"
        out += (
            f"<!-- not run: an example -->\n```bash\n{command.example}\n```\n\n"
            + table(options(command_parser(name)[0]))
            + "\n"
        )
    out += FIT
    for cls, prefix in ((LitSAE, "model"), (RunCheckpoint, "checkpoint"), (ExportSAE, "export")):
        out += class_section(cls, prefix, f"--{prefix}", "###")
    out += class_section(DeadLatentReport, "latents", "--latents", "###")
    parser = ArgumentParser()
    add_group(parser, Members)
    out += "### Several SAEs\n\n" + Members.__doc__ + "\n\n" + table(options(parser)) + "\n"
    out += "### Data\n\n"
    for name in datamodules.__all__:
        out += class_section(getattr(datamodules, name), "data", f"datamodules.{name}")
    out += "### SAE and its parts\n\n" + class_section(SAE, "", "mmsae.SAE")
    parts = ("Normaliser", "AffineEncoder", "DistanceEncoder", "PerModalityEncoder", "TopK", "Dictionary")
    for name in (*parts, "Reconstruction", "AuxK", "CodeCosine"):
        out += class_section(getattr(mmsae.sae, name), "", f"mmsae.sae.{name}")
    return out + class_section(Schedule, "", "mmsae.training.Schedule").rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(render())
    print(FILE)
