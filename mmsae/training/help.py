"""``mmsae fit --help``: the options that most trainings need, and the recipes, without importing what trains.

Lightning's own help, which ``--help all`` gives, lists some 150 options and takes seconds to make.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator

from mmsae.recipes import purpose, recipes_of

SUMMARY = {
    "fit": "train an SAE",
    "validate": "measure a trained SAE on validation data",
    "test": "measure a trained SAE on test data",
    "predict": "run a job over shards (filter, weights, ...) by Lightning, on several nodes",
}
EXAMPLE = {
    "fit": "mmsae fit -c configs/train/paired_topk_store.yaml --data.store STORE --trainer.default_root_dir RUN",
    "predict": "mmsae predict -c configs/filter/pair_weighted.yaml --model.sae SAE --model.shards TARS --model.out OUT",
}
OPTIONS = {
    "The run": {
        "-c, --config RECIPE": "YAML file with any option; several: later ones win, and options win over all",
        "--trainer.default_root_dir RUN": "folder of the run: logs, checkpoints, and the SAE folder RUN/sae (runs/fit)",
        "--ckpt_path last": "go on with the run in that folder, or start it where there is none",
        "--trainer.max_steps N": "steps of the training",
        "--trainer.accelerator NAME": "cpu, gpu or auto",
        "--trainer.devices N": "processes, one for each device",
        "--trainer.enable_progress_bar BOOL": "whether to show a bar",
        "--seed_everything N": "seed of weights and order (0)",
        "--threads N": "CPU threads of each process",
        "--print_config": "print all options as YAML, and do nothing",
    },
    "The data, a datamodule by its class": {
        "--data CLASS": "one of the package datamodules: CachedActivations (store), StreamingActivations (shards), ...",
        "--data.store STORE": "the store that mmsae extract wrote",
        "--data.shards SHARDS": "shards that are streamed through --data.host",
        "--data.batch_size N": "rows, or pairs, of a step on each device",
    },
    "The SAE, its losses and its optimiser": {
        "--model.sae.init_args.ratio R": "latents per input feature; or d_sae, their number",
        "--model.sae.init_args.selector.init_args.k K": "latents that stay on in a row",
        "--model.losses LIST": "loss terms",
        "--model.optimizer CLASS": "the optimiser; --model.optimizer.lr is its rate",
        "--axes.k '[8, 16, 32]'": "one SAE for each value, all from one pass over the data; also ratio, d_sae, lr, "
        "freeze, sites, seed or a dotted option, every combination",
        "--members MAPPING": "the same by name, {NAME: {option: value}}; each goes to RUN/NAME",
        "--export.folder DIR": "where the SAE goes (RUN/sae)",
    },
}


def text(command: str) -> str:
    """The page of one of Lightning's subcommands."""
    example = EXAMPLE.get(command, EXAMPLE["fit"].replace("mmsae fit", f"mmsae {command}") + " --ckpt_path last")
    lines = [f"usage: mmsae {command} -c RECIPE [options]", "", SUMMARY[command], ""]
    for title, options in OPTIONS.items():
        lines += [f"{title}:", *_columns(options), ""]
    folders = {"train": "Recipes"} if command != "predict" else {"filter": "Jobs"}
    for folder, title in folders.items():
        said = {f"configs/{folder}/{path.name}": purpose(path) for path in recipes_of(folder)}
        lines += [f"{title}:", *_columns(said), ""]
    lines += textwrap.wrap(
        f"These are the options that most runs need. `mmsae {command} --help all` lists every one of the trainer, the "
        f"model and the data (it takes some seconds), `mmsae {command} --data.help CLASS` and `--model.sae.help` those "
        "of a part; docs/reference/cli.md explains ours.",
        _width(),
    )
    return "\n".join([*lines, "", "example:", f"  {example}"])


def _width() -> int:
    return min(120, shutil.get_terminal_size().columns - 2)


def _columns(said: dict[str, str], left: int = 24) -> Iterator[str]:
    for name, meaning in said.items():
        first, *rest = textwrap.wrap(meaning, max(30, _width() - left)) or [""]
        if len(name) > left - 4:
            yield f"  {name}"
        yield (f"  {name:{left - 2}s}" if len(name) <= left - 4 else " " * left) + first
        yield from (" " * left + line for line in rest)
