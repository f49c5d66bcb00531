"""Other modules than LitSAE: any LightningModule that a recipe names by ``class_path``.

``mmsae predict`` runs jobs over shards, whose modules bring their own batches and files; Lightning brings processes,
devices and machines. ``mmsae fit`` trains what an SAE needs beside it (the aligner).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mmsae.recipes import job_of
from mmsae.threads import HELP, use_threads
from mmsae.training.callbacks import RunProgress


def names_a_module(args: Sequence[str]) -> bool:
    """Whether a recipe among the options (or the options themselves) says which module to run."""
    text = " ".join(args)  # --model alone may also name a file with LitSAE's arguments
    named = re.search(r"(^| )--model(\.class_path[= ]|[= ][\w.]+\.[A-Z]\w*( |$))", text)
    recipes = [value for option, value in pairwise(args) if option in ("-c", "--config")]
    return bool(named) or any(job_of(path) for path in recipes)


class ThreadsCLI(LightningCLI):
    """LightningCLI with ``--threads``, which holds in every rank, for each reads the command line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The option."""
        parser.add_argument("--threads", type=int | None, default=None, help=HELP)

    def before_instantiate_classes(self) -> None:
        """Before anything computes."""
        use_threads(self._get(self.config, "threads"))


class JobCLI(ThreadsCLI):
    """LightningCLI for one module: no logs and, unless asked for, no checkpoints; it writes its own files."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A trainer whose ranks may wait long for each other: tars are not equally large."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("enable_progress_bar") is not False:
            kwargs["callbacks"] = [*(config.get("callbacks") or []), RunProgress()]
        trainer = super().instantiate_trainer(**kwargs)
        if hasattr(trainer.strategy, "_timeout"):  # of DDP: 30 minutes, and no other way that leaves strategy: auto
            trainer.strategy._timeout = timedelta(days=7)
        return trainer

    def predict(self, model: pl.LightningModule, **kwargs: Any) -> None:
        """Run; what the module returns for each batch is not kept."""
        self.trainer.predict(model, **{**kwargs, "return_predictions": False})


def build_job(args: list[str] | None, run: bool = True) -> JobCLI:
    """The configured CLI; ``run=False`` only instantiates (then ``args`` has no subcommand)."""
    return JobCLI(
        pl.LightningModule,
        subclass_mode_model=True,
        seed_everything_default=False,
        save_config_callback=None,
        parser_kwargs={"prog": "mmsae", "exit_on_error": False}
        | {c: {"exit_on_error": False} for c in LightningCLI.subcommands()},
        auto_configure_optimizers=False,
        trainer_defaults={"logger": False, "enable_checkpointing": False, "enable_model_summary": False},
        args=args,
        run=run,
    )
