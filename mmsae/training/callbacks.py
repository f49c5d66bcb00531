"""Callbacks: checkpoints in the run folder, the SAE folder, and the dead-latent report."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from mmsae.files import atomic_file


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, in ``RUN/checkpoints``, with a ``last.ckpt`` for ``--ckpt_path last``.

    Args:
        every_n_train_steps: Steps between checkpoints.
        dirpath: Where to; default ``<default_root_dir>/checkpoints``, which does not move with logger versions, so that
            a run that is started again finds it.
    """

    def __init__(self, every_n_train_steps: int = 500, dirpath: str | None = None):
        super().__init__(
            dirpath=dirpath,
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            save_top_k=1,
            save_on_train_epoch_end=False,
            filename="step",
            enable_version_counter=False,
        )


class RunProgress(TQDMProgressBar):
    """Lightning's bar without the logger's version number, which says nothing about the training."""

    def get_metrics(self, *args, **kwargs) -> dict:
        """Metrics shown behind the bar."""
        return {k: v for k, v in super().get_metrics(*args, **kwargs).items() if k != "v_num"}


class ExportSAE(Callback):
    """Writes the SAE folder at the end of training, and another one at the best validation value.

    Args:
        folder: Where to; default ``<default_root_dir>/sae``. The best goes to ``<folder>-best``.
        monitor: Logged value whose minimum is the best.
    """

    def __init__(self, folder: str | None = None, monitor: str = "val/fvu/joint"):
        self.folder, self.monitor = folder, monitor
        self.best = float("inf")

    def state_dict(self) -> dict:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state: dict) -> None:
        """Restore the best value."""
        self.best = state["best"]

    def _target(self, trainer: pl.Trainer) -> Path:
        return Path(self.folder or Path(trainer.default_root_dir) / "sae")

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, folder: Path) -> None:
        if not trainer.is_global_zero:
            return
        seen = {m: int(n) for m, n in zip(module.usage.modalities, module.usage.tokens, strict=True)}
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val/", "test/"))}
        module.sae.save_pretrained(folder, {"steps": trainer.global_step, "tokens": seen, "validation": metrics})

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the best."""
        value = trainer.callback_metrics.get(self.monitor)
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or value is None or not float(value) < self.best:
            return
        self.best = float(value)
        target = self._target(trainer)
        self._save(trainer, module, target.with_name(target.name + "-best"))

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the final SAE."""
        self._save(trainer, module, self._target(trainer))
        if trainer.is_global_zero:
            module.print(f"SAE written to {self._target(trainer)}")


class DeadLatentReport(Callback):
    """Writes ``latents.json`` beside the SAE: which latents are dead, which are hubs, density per modality.

    Args:
        dead_after: Tokens without firing on any modality after which a latent is dead; None takes the module's.
        hub_above: Share of tokens above which a latent is a hub.
        file: Where to; default ``<default_root_dir>/latents.json``.
    """

    def __init__(self, dead_after: int | None = None, hub_above: float = 0.1, file: str | None = None):
        self.dead_after, self.hub_above, self.file = dead_after, hub_above, file

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the report and say its two shares."""
        if not trainer.is_global_zero:
            return
        usage = module.usage
        dead = usage.dead(self.dead_after or module.dead_after)
        report = {"d_sae": len(dead), "dead": dead.nonzero()[:, 0].tolist(), "modalities": {}}
        lines = [f"dead latents {float(dead.float().mean()):.1%}"]
        for m in usage.modalities:
            density = usage.density(m)
            hubs = (density > self.hub_above).nonzero()[:, 0].tolist()
            never = int((density == 0).sum())
            report["modalities"][m] = {
                "never_fired": never,
                "hubs": hubs,
                "density": [round(v, 6) for v in density.tolist()],
            }
            lines.append(f"{m}: {never} of {len(dead)} never fired, {len(hubs)} on over {self.hub_above:.0%} of tokens")
        with atomic_file(self.file or Path(trainer.default_root_dir) / "latents.json") as temp:
            temp.write_text(json.dumps(report))
        module.print("; ".join(lines))
