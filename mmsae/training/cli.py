"""``mmsae fit|validate|test|predict``: LightningCLI with the run-folder conventions of mmsae."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mmsae.files import nbytes
from mmsae.options import Process, add_group, use_threads
from mmsae.recipes import configs_first, each_recipe, job_of, whole_recipe
from mmsae.training.callbacks import DeadLatentReport, ExportSAE, RunProgress
from mmsae.training.checkpoint import RunCheckpoint, disk_errors
from mmsae.training.lit import LitSAE
from mmsae.training.loop import EpochLoop
from mmsae.training.members.lit import LitSAEs, as_member, drawing_from
from mmsae.training.members.options import Members, as_args
from mmsae.training.members.view import MemberTable, for_each_member
from mmsae.training.messages import tidy_messages
from mmsae.types import InputError


def names_a_module(args: Sequence[str]) -> bool:
    """Whether a recipe among the options (or the options themselves) says which module to run."""
    text = " ".join(args)  # --model alone may also name a file with LitSAE's arguments
    named = re.search(r"(^| )--model(\.class_path[= ]|[= ][\w.]+\.[A-Z]\w*( |$))", text)
    recipes = [value for option, value in pairwise(args) if option in ("-c", "--config")]
    return bool(named) or any(job_of(path) for path in recipes)


def as_plain(value: Any) -> Any:
    """What an option says, without the types that the parser saw in it."""
    if isinstance(value, (Namespace, Mapping)):
        return {k: as_plain(v) for k, v in (vars(value) if isinstance(value, Namespace) else value).items()}
    return [as_plain(v) for v in value] if isinstance(value, list) else value


# errors reach mmsae.cli, which turns them into one sentence
_PARSER = {"prog": "mmsae", "exit_on_error": False}
_PARSER |= {c: {"exit_on_error": False} for c in LightningCLI.subcommands()}


class BaseCLI(LightningCLI):
    """LightningCLI with mmsae's progress bar, and with ``--threads``, which every rank reads for itself."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_group(parser, Process)

    def before_instantiate_classes(self) -> None:
        use_threads(self._get(self.config, "threads"))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self._get(self.config_init, "trainer", default={})
        if config.get("enable_progress_bar") is not False:
            kwargs["callbacks"] = [*(config.get("callbacks") or []), RunProgress()]
        return super().instantiate_trainer(**kwargs)


class JobCLI(BaseCLI):
    """LightningCLI for one module: no logs and, unless asked for, no checkpoints; it writes its own files."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A trainer whose ranks may wait long for each other: tars are not equally large."""
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
        parser_kwargs=_PARSER,
        auto_configure_optimizers=False,
        trainer_defaults={"logger": False, "enable_checkpointing": False, "enable_model_summary": False},
        args=args and each_recipe(args, whole_recipe),
        run=run,
    )


class RunCLI(BaseCLI):
    """LightningCLI whose run lives in ``--trainer.default_root_dir``: logs, checkpoints and the SAE folder."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportSAE, "export")
        parser.add_lightning_class_args(DeadLatentReport, "latents")
        add_group(parser, Members)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        self._args = args

    def instantiate_classes(self) -> None:
        """The recipe's SAE, or the members that it says; those are parsed as runs of their own with an option more."""
        super().instantiate_classes()
        members, axes = (as_plain(self._get(self.config, name)) for name in ("members", "axes"))
        if not (options := Members(members, axes).options()):
            return
        made = {name: self._member(name, own) for name, own in options.items()}
        apart = any("data.sites" in own for own in options.values())
        self.model = LitSAEs(
            {name: m for name, (m, _) in made.items()}, {name: s for name, (_, s) in made.items()} if apart else None
        )
        for option in ("export.folder", "latents.file"):
            if self._get(self.config, option):
                raise InputError(f"--{option} is where one SAE goes: members go to RUN/NAME")
        self.trainer.callbacks = [*for_each_member(self.trainer.callbacks, options), MemberTable(options)]

    def _member(self, name: str, options: Mapping[str, Any]) -> tuple[LitSAE, Any]:
        """A member, and the sites that it reads."""
        config = self.parser.parse_args([*self._args, *as_args(options)])
        parser, config = self._parser(self.subcommand), config.get(str(self.subcommand), config)
        seed = config["seed_everything"] if "seed_everything" in options else self._get(self.config, "seed_everything")
        with as_member(name), drawing_from(seed):
            member = parser.instantiate_classes(Namespace(model=config["model"]))["model"]
        member.seed = seed
        return member, as_plain((config["data"].get("init_args") or {}).get("sites"))

    def instantiate_trainer(self, **kwargs) -> pl.Trainer:
        """Loggers go to the run folder unless the configuration says otherwise."""
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") is None:
            root = config["default_root_dir"]
            kwargs["logger"] = [
                CSVLogger(root, name="logs"),
                TensorBoardLogger(root, name="logs", version="tensorboard"),
            ]
        steps, interval = config.get("max_steps") or -1, config.get("val_check_interval")
        if isinstance(interval, int) and 0 < steps < interval:
            kwargs["val_check_interval"] = steps  # a short run is validated once, at its end, rather than never
        trainer = super().instantiate_trainer(**kwargs)
        EpochLoop.install(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        with self._clean_failure():
            super()._run_subcommand(subcommand)

    @contextmanager
    def _clean_failure(self) -> Iterator[None]:
        """Take away the log files of a run that bad input stopped before its first step; a full disk in one sentence.

        Lightning begins the logs before anything is checked.
        """
        root = Path(self.trainer.default_root_dir)
        logs, new = root / "logs", not root.exists()
        before = set(logs.rglob("*"))
        try:
            with disk_errors(root), self._memory_errors():
                yield
        except (InputError, OSError) as e:
            if self.trainer.is_global_zero and (self.trainer.global_step == 0 or self.model.total_steps is None):
                for path in sorted(set(logs.rglob("*")) - before, reverse=True):  # what is in a folder comes first
                    path.rmdir() if path.is_dir() else path.unlink()
                for folder in (logs, root) if new else (logs,):
                    if folder.exists() and not any(folder.iterdir()):
                        folder.rmdir()
            if isinstance(e, OSError) and Path(e.filename or "").is_relative_to(root):
                raise InputError(f"{e.filename} cannot be written ({e.strerror})") from e
            raise

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        """Say which settings would help where a device has no memory left."""
        try:
            yield
        except torch.OutOfMemoryError as e:
            trainer, data, ways = self.trainer, self.datamodule, []
            begun = trainer.global_step > 0 or self.model.total_steps is not None
            when = f"in step {trainer.global_step + 1:,}" if begun else "before the first step"
            if rows := not begun and getattr(self.model, "normaliser_rows", 0):
                ways.append(f"model.normaliser_rows (now {rows:,})")
            if size := getattr(data, "batch_size", 0) or getattr(getattr(data, "mixing", None), "batch_size", 0):
                ways.append(f"data.batch_size (now {size:,})")
            if d_sae := getattr(getattr(self.model, "sae", None), "d_sae", 0):
                ways.append(f"the number of latents (ratio or d_sae of model.sae, now {d_sae:,})")
            if (n := len(self.model.each())) > 1:
                ways.append(f"the number of members (now {n})")
            if held := getattr(data, "resident_bytes", 0):
                ways.append(f"data.resident (false leaves {nbytes(held)} of rows on disk)")
            raise InputError(
                f"{trainer.strategy.root_device} has no memory left {when}: lower {', '.join(ways) or 'what it holds'}"
            ) from e

    def before_fit(self) -> None:
        """Say what an earlier run left in the folder, and whether this one goes on with it."""
        root = Path(self.trainer.default_root_dir)
        last = self._last_checkpoints()
        options = self.config_init[self.subcommand]
        if not isinstance(self.model, LitSAEs):  # whose members have their own
            self.model.seed = options.get("seed_everything")
        self._check(options)
        if options.get("ckpt_path") == "last" and not last:
            options["ckpt_path"] = None
            for callback in self.trainer.callbacks:
                for export in getattr(callback, "copies", {"": callback}).values():
                    if isinstance(export, ExportSAE):
                        export.resumes = True
            rank_zero_info(f"no checkpoint in {root} yet: training starts at step 0")
        elif not options.get("ckpt_path"):
            saes = [root / name / sae for name in self.model.each() for sae in ("sae", "sae-best", "sae-last-good")]
            if found := [str(p) for p in (*last, *saes) if p.exists()]:
                rank_zero_info(
                    f"{root} was used before: {', '.join(found)}. This run starts anew and puts them aside as "
                    "*earlier*; to go on with the earlier run instead, stop this one and add --ckpt_path last."
                )

    def _before_evaluation(self) -> None:
        options = self.config_init[self.subcommand]
        saes = [member.sae for member in self.model.each().values()]
        self._check(options)
        if options.get("ckpt_path") == "last" and not self._last_checkpoints():
            raise InputError(f"no checkpoint in {self.trainer.default_root_dir} to {self.subcommand}")
        if not options.get("ckpt_path") and not all(s.d_in and s.normaliser.fitted for s in saes):
            raise InputError(f"nothing trained to {self.subcommand}: give --ckpt_path last, or a checkpoint file")

    before_validate = before_test = before_predict = _before_evaluation

    def _check(self, options: Namespace) -> None:
        """What can be refused before other ranks are started and logs are begun."""
        if options.get("ckpt_path") == "best":
            raise InputError("there is no best checkpoint, only RUN/sae-best: give --ckpt_path last, or a file")
        if options.get("ckpt_path") == "hpc" and not self.trainer._checkpoint_connector._hpc_resume_path:
            root = self.trainer.default_root_dir
            raise InputError(f"no checkpoint of a requeued job (hpc_ckpt_N.ckpt) in {root}: give --ckpt_path last")
        # reads the store's spec or the host's configuration, if they are there
        if not getattr(self.model, "choices", None):
            getattr(self.datamodule, "d_in", None)
            return
        self.model.share_sites(self.datamodule)
        for name in self.model.each():
            with as_member(name):
                getattr(self.model.data_of(name, self.datamodule), "d_in", None)

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
        parser_kwargs=_PARSER,
        auto_configure_optimizers=False,
        trainer_defaults={
            "max_epochs": -1,
            "num_sanity_val_steps": 0,
            "default_root_dir": "runs/fit",
            "enable_model_summary": False,
        },
        args=args and each_recipe(args, whole_recipe),
        run=run,
    )


def run(args: list[str]) -> None:
    """Run one of Lightning's subcommands; recipes are resolved before parsing.

    Where a recipe names another module than LitSAE (``model.class_path``), that one is run.

    Raises:
        InputError: Something that was asked for cannot be had.
    """
    tidy_messages()
    args = [args[0], *configs_first(args[1:])]
    try:
        build_job(args) if names_a_module(args) else build_cli(args)
    except MisconfigurationException as e:  # Lightning's word for settings that do not go together
        raise InputError(" ".join(str(e).split())) from e
