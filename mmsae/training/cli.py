"""``mmsae fit|validate|test|predict``: LightningCLI with the run-folder conventions of mmsae."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from mmsae.recipes import find_recipe
from mmsae.training.callbacks import DeadLatentReport, ExportSAE, RunCheckpoint, RunProgress
from mmsae.training.lit import LitSAE


# the arguments come from mmsae's own entry point on purpose
warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
# said by Lightning about its own use of torch
warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.. is deprecated")


class RunCLI(LightningCLI):
    """LightningCLI whose run lives in ``--trainer.default_root_dir``: logs, checkpoints and the SAE folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks that every run has, each with its own options."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportSAE, "export")
        parser.add_lightning_class_args(DeadLatentReport, "latents")

    def instantiate_trainer(self, **kwargs) -> pl.Trainer:
        """Loggers and checkpoints go to the run folder unless the configuration says otherwise."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") is None:
            root = config["default_root_dir"]
            kwargs["logger"] = [
                CSVLogger(root, name="logs"),
                TensorBoardLogger(root, name="logs", version="tensorboard"),
            ]
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        return trainer

    def before_fit(self) -> None:
        """Say what an earlier run left in the folder."""
        root = Path(self.trainer.default_root_dir)
        last = root / "checkpoints" / "last.ckpt"
        if self.config_init[self.subcommand].get("ckpt_path"):
            return
        found = [str(p.relative_to(root)) for p in (last, root / "sae", root / "sae-best") if p.exists()]
        if found:
            rank_zero_info(
                f"{root} holds {', '.join(found)} of an earlier run. This run starts anew and will replace them; "
                "stop it and add --ckpt_path last to go on with the earlier one."
            )


def build_cli(args: list[str] | None, run: bool = True) -> RunCLI:
    """The configured CLI; ``run=False`` only instantiates (then ``args`` has no subcommand)."""
    return RunCLI(
        LitSAE,
        pl.LightningDataModule,
        subclass_mode_model=False,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        # errors reach mmsae.cli, which turns them into one sentence
        parser_kwargs={"prog": "mmsae", "exit_on_error": False}
        | {c: {"exit_on_error": False} for c in LightningCLI.subcommands()},
        auto_configure_optimizers=False,
        trainer_defaults={
            "max_epochs": -1,
            "num_sanity_val_steps": 0,
            "default_root_dir": "runs/fit",
            "enable_model_summary": False,
            "callbacks": [RunProgress()],
        },
        args=args,
        run=run,
    )


def run(args: list[str]) -> None:
    """Run one of Lightning's subcommands; recipes are resolved before parsing."""
    resolved = []
    for previous, value in zip(["", *args], args, strict=False):
        if previous in ("-c", "--config"):
            value = find_recipe(value)
        elif value.startswith("--config="):
            value = "--config=" + find_recipe(value.split("=", 1)[1])
        resolved.append(value)
    build_cli(resolved)
