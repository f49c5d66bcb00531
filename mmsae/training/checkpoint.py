"""Checkpoints that are whole or not there, whatever kills the run, and from which a run goes on exactly."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from mmsae import files
from mmsae.files import atomic_file, remove_leftovers
from mmsae.types import InputError

_GO_ON = "go on with --ckpt_path last"
ASKED_EVERY = 10  #: Steps after which ranks ask each other whether one was told to stop; all wait for that.
disk_errors = partial(files.disk_errors, then=_GO_ON)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then renames it: a kill or a full disk leaves the one before.

    :class:`RunCheckpoint` installs it; a trainer without that callback takes it as ``plugins=[AtomicCheckpointIO()]``.
    (Lightning's own writes to the system's temporary folder and moves, which is a copy where that is another disk.)
    """

    mapped = False  #: Whether a checkpoint's tensors are read from the file when they are used, and no sooner.

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; a full disk is said in one sentence."""
        if "://" in str(path):  # object stores are atomic by themselves
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with disk_errors(Path(path).parent), atomic_file(path) as temp, temp.open("wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())  # else a power cut may leave the new name with no content

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; a missing or damaged file is said in one sentence."""
        try:
            if self.mapped:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError as e:
            raise InputError(f"no checkpoint at {path}") from e
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as e:
            raise InputError(
                f"{path} is damaged, unreadable or not a checkpoint ({type(e).__name__}): remove it to start anew"
            ) from e


class RunCheckpoint(ModelCheckpoint):
    """Writes ``RUN/checkpoints/last.ckpt``, from which ``--ckpt_path last`` goes on to the very same result.

    Where a step is followed by a validation, the checkpoint is written after it: Lightning does not repeat the
    validation of a step that a checkpoint has behind it, so a run killed in between would never know that value.
    The last step of a training is always written. So is the one at which SIGTERM arrives (a scheduler's way to say that
    the time is over; with several ranks a step that follows within ten): then the process ends with exit code 143.

    A training that starts anew in a used folder puts an earlier ``last.ckpt`` aside, as ``earlier.ckpt``: if it is
    killed before its own first checkpoint, nothing must go on with the other run.

    Args:
        every_n_train_steps: Steps between checkpoints.
        dirpath: Folder of the checkpoints; default ``<default_root_dir>/checkpoints``, which does not move with logger
            versions, so that a run that is started again finds it.
    """

    def __init__(self, every_n_train_steps: int = 500, dirpath: str | None = None):
        if every_n_train_steps < 1:
            raise InputError(f"every_n_train_steps must be at least 1, not {every_n_train_steps}")
        super().__init__(
            dirpath=dirpath,
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            save_top_k=0,  # last.ckpt is all
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.written: str | None = None  #: The checkpoint that holds the last state of this very run.
        self._due = False
        self._told = False  # to stop

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the folder and see to it that checkpoints are written whole."""
        self._settle(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        super().setup(trainer, pl_module, stage)

    def _settle(self, trainer: pl.Trainer) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        """What ``last`` means; asked before ``setup``, when Lightning would still look among the logs."""
        self._settle(trainer)
        return super()._find_last_checkpoints(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the last checkpoint of an earlier run aside, and remove what a killed one left half-written."""
        super().on_train_start(trainer, pl_module)
        self._listen(trainer)
        self.written = str(trainer.ckpt_path) if trainer.ckpt_path and trainer.global_step else None
        if trainer.is_global_zero:
            last = Path(self.dirpath) / "last.ckpt"
            remove_leftovers(last)
            if trainer.global_step == 0 and last.exists():
                os.replace(last, last.with_name("earlier.ckpt"))
                rank_zero_info(f"the checkpoint of an earlier run is now {last.with_name('earlier.ckpt')}")

    def _listen(self, trainer: pl.Trainer) -> None:
        """Have SIGTERM noted, not acted on: Lightning would end a validation in the middle, or a step unsaved."""
        if threading.current_thread() is not threading.main_thread():
            return  # signals are the main thread's

        def told(signum: int, _: Any) -> None:
            launcher = trainer.strategy.launcher
            if launcher is not None and not self._told:
                launcher.kill(signum)  # the other ranks of this machine
            self._told = True

        self._told = trainer.received_sigterm
        trainer._signal_connector.received_sigterm = False
        signal.signal(signal.SIGTERM, told)  # Lightning puts back what there was before it when the training ends

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Write, or note that it is due after the validation that comes now."""
        if trainer.fit_loop._should_accumulate():
            return  # in the middle of a step
        due = trainer.global_step % self._every_n_train_steps == 0
        asks = due or trainer.world_size == 1 or trainer.global_step % ASKED_EVERY == 0
        if (asks and self._stops(trainer)) or due:
            self._due = True
            if not _validates_now(trainer):
                self._write(trainer)
                self._stop(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._due = self._stops(trainer) or self._due
            self._write(trainer)
            self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._due = True
        self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop the workers of a stream; those that live at the interpreter's end are reported as killed."""
        super().on_exception(trainer, *args)
        close = getattr(trainer.train_dataloader, "close", None)
        if close is not None:
            close()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: there is no best checkpoint, and a run folder may be moved."""
        return {}

    def _stops(self, trainer: pl.Trainer) -> bool:
        """Whether any rank was told to stop; asked by all of them at the same place."""
        if trainer.world_size > 1:
            self._told = trainer.strategy.reduce_boolean_decision(self._told, all=False)
        return self._told

    def _stop(self, trainer: pl.Trainer) -> None:
        if self._told:
            last = Path(self.dirpath) / "last.ckpt"
            rank_zero_info(f"stopped by SIGTERM after step {trainer.global_step:,}, which {last} holds; {_GO_ON}")
            raise SystemExit(128 + signal.SIGTERM)

    def _write(self, trainer: pl.Trainer) -> None:
        if self._due and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, {})
            self.written = self.last_model_path
        self._due = False


def _validates_now(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates when the current step's hooks are done."""
    loop = trainer.fit_loop.epoch_loop
    return not loop.val_loop.skip and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
