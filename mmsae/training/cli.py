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
from mmsae.training.callbacks import DeadLatentReport, ExportSAE, RunProgress
from mmsae.training.checkpoint import RunCheckpoint
from mmsae.training.lit import LitSAE
from mmsae.types import InputError

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
        """Loggers go to the run folder unless the configuration says otherwise."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") is None:
            root = config["default_root_dir"]
            kwargs["logger"] = [
                CSVLogger(root, name="logs"),
                TensorBoardLogger(root, name="logs", version="tensorboard"),
            ]
        if config.get("enable_progress_bar") is not False:
            kwargs["callbacks"] = [*(config.get("callbacks") or []), RunProgress()]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Say what an earlier run left in the folder, and whether this one goes on with it."""
        root = Path(self.trainer.default_root_dir)
        last = self._last_checkpoints()
        options = self.config_init[self.subcommand]
        if options.get("ckpt_path") == "last" and not last:
            options["ckpt_path"] = None
            rank_zero_info(f"no checkpoint in {root} yet: training starts at step 0")
        elif not options.get("ckpt_path"):
            found = [str(p) for p in (*last, root / "sae", root / "sae-best") if p.exists()]
            if found:
                rank_zero_info(
                    f"{root} was used before: {', '.join(found)}. This run starts anew and puts them aside as "
                    "*earlier*; to go on with the earlier run instead, stop this one and add --ckpt_path last."
                )

    def _before_evaluation(self) -> None:
        options = self.config_init[self.subcommand]
        sae = self.model.sae
        if options.get("ckpt_path") == "last" and not self._last_checkpoints():
            raise InputError(f"no checkpoint in {self.trainer.default_root_dir} to {self.subcommand}")
        if not options.get("ckpt_path") and not (sae.d_in and sae.normaliser.fitted):
            raise InputError(f"nothing trained to {self.subcommand}: give --ckpt_path last, or a checkpoint file")

    before_validate = before_test = before_predict = _before_evaluation

    def _last_checkpoints(self) -> list[Path]:
        folders = [c.dirpath for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        default = Path(self.trainer.default_root_dir) / "checkpoints"
        return [p for f in folders if (p := Path(f or default) / "last.ckpt").exists()]

    def _parse_ckpt_path(self) -> None:
        """Lightning looks for hyperparameters in the checkpoint here; LitSAE stores none, so nothing is read twice."""


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
