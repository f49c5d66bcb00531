"""Callbacks: the SAE folder, the dead-latent report and the progress bar."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from mmsae.files import atomic_file, remove_leftovers
from mmsae.training.checkpoint import disk_errors
from mmsae.training.lit import NotFinite


class RunProgress(TQDMProgressBar):
    """Lightning's bar, drawn by time instead of by batch (a step may take 2 ms, drawing takes a tenth of that).

    Args:
        every: Seconds between drawings; None: 0.2 on a terminal, 10 where the output goes to a file.
    """

    def __init__(self, every: float | None = None):
        super().__init__()
        self.every = every
        self._drawn = 0.0

    def get_metrics(self, *args: Any, **kwargs: Any) -> dict:
        """Metrics shown behind the bar, without the logger's version number."""
        return {k: v for k, v in super().get_metrics(*args, **kwargs).items() if k != "v_num"}

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        bar = self.train_progress_bar
        if not bar.disable:
            bar.n = trainer.fit_loop.epoch_loop.batch_progress.current.processed
            bar.set_postfix(self.get_metrics(trainer, trainer.lightning_module))
        super().on_train_end()

    def _should_update(self, current: int, total: int) -> bool:
        every = self.every if self.every is not None else 0.2 if sys.stdout.isatty() else 10.0
        if not self.is_enabled or time.monotonic() - self._drawn < every:
            return False
        self._drawn = time.monotonic()
        return True


class ExportSAE(Callback):
    """Writes the SAE folder at the end of training, and another one at the best validation value.

    A training that starts anew in a used folder puts earlier SAE folders aside (``sae-earlier``, ``sae-best-earlier``):
    what has the name of this run's result is this run's result. One of several SAEs that diverged is written as it was
    at the checkpoint before (``sae-last-good``).

    Args:
        folder: Folder to write; default ``<default_root_dir>/sae``. The best goes to ``<folder>-best``.
        monitor: Logged value whose minimum is the best.
    """

    each_member = True

    def __init__(self, folder: str | None = None, monitor: str = "val/fvu/joint"):
        self.folder, self.monitor = folder, monitor
        self.resumes = False  # whether the run was to go on, though there may be no checkpoint yet
        self.best = float("inf")
        self.validation: dict[str, float] = {}

    def state_dict(self) -> dict:
        return {"best": self.best, "validation": self.validation}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.validation = state["best"], state.get("validation", {})

    def targets(self, trainer: pl.Trainer) -> tuple[Path, Path]:
        """Folder of the last and of the best SAE."""
        last = Path(self.folder or Path(trainer.default_root_dir) / "sae")
        return last, last.with_name(last.name + "-best")

    def keep_last_good(self, trainer: pl.Trainer, module: pl.LightningModule, steps: int, why: str) -> None:
        """Write ``sae-last-good``: an SAE after ``steps``, whose training diverged later."""
        last, _ = self.targets(trainer)
        self._save(trainer, module, _last_good(last), {"steps": steps, "diverged": why})

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, folder: Path, own: Mapping[str, Any] = {}) -> None:
        """Have rank 0 write the SAE, and facts of its own; every rank must ask, for they may share its latents."""
        sae = module.whole()
        if not trainer.is_global_zero:
            return
        for name, p in sae.named_parameters():
            if not torch.isfinite(p).all():
                raise NotFinite(
                    f"the training diverged: {name} is no longer finite after {trainer.global_step} steps, no SAE "
                    "is written; lower the learning rate or check the activations"
                )
        held = getattr(trainer.train_dataloader, "n_rows", {})  # of a store; a stream has no end
        seen = {m: int(n) for m, n in zip(module.usage.modalities, module.usage.tokens, strict=True)}
        facts = {"steps": trainer.global_step, "tokens": seen, "rows": held, "validation": self.validation}
        facts |= {"freeze": module.kept.what} if module.kept.what else {}
        facts |= own
        with disk_errors(folder.parent):
            sae.save_pretrained(folder, facts)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Put the SAEs of an earlier run aside, and remove what a killed one left half-written.

        A best SAE without a final one, of a run that was killed before its first checkpoint and is to go on, is this
        run's own: the first validation writes it again.
        """
        last, best = self.targets(trainer)
        own = best if self.resumes and not last.exists() else None
        for folder in (last, best, _last_good(last)) if trainer.is_global_zero else ():
            remove_leftovers(folder)
            if trainer.global_step == 0 and folder.exists() and folder != own:
                aside = folder.with_name(folder.name + "-earlier")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)
                rank_zero_info(f"the SAE of an earlier run is now {aside}")
        if trainer.is_global_zero and trainer.global_step:  # diverged after the checkpoint that this run goes on from
            shutil.rmtree(_last_good(last), ignore_errors=True)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        self.validation = {k: float(v) for k, v in metrics.items() if k.startswith("val/")}
        value = metrics.get(self.monitor)
        if value is not None and float(value) < self.best:
            self.best = float(value)
            self._save(trainer, module, self.targets(trainer)[1])

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the final SAE; also where a run that was killed after its last step is resumed and has no step left."""
        folder = self.targets(trainer)[0]
        self._save(trainer, module, folder)
        if trainer.is_global_zero:
            print(f"SAE written to {folder}", flush=True)


def _last_good(folder: Path) -> Path:
    return folder.with_name(folder.name + "-last-good")


class DeadLatentReport(Callback):
    """Writes ``latents.json`` beside the SAE: which latents are dead, which are hubs, density per modality.

    Dead are those that did not fire for the module's ``dead_after`` tokens, which is AuxK's bound too; a training that
    saw fewer cannot know.

    Args:
        hub_above: Share of tokens above which a latent is a hub.
        file: File to write; default ``<default_root_dir>/latents.json``.
    """

    each_member = True

    def __init__(self, hub_above: float = 0.1, file: str | None = None):
        self.hub_above, self.file = hub_above, file

    @torch.no_grad()
    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the report and say its shares, and that of the last validation."""
        usage, bound = module.whole_usage(), module.dead_after
        if not trainer.is_global_zero:
            return
        dead, known = usage.dead(bound), usage.known(bound)
        report = {"d_sae": len(dead), "dead_after": bound, "modalities": {}}
        report["dead"] = dead.nonzero()[:, 0].tolist() if known else None
        lines = [f"dead latents (none of the last {bound:,} tokens) {float(dead.float().mean()):.1%}"]
        if not known:
            seen = int(usage.tokens.min())
            lines = [f"dead latents not known: {seen:,} tokens were seen, latents count as dead after {bound:,}"]
        for m in usage.modalities:
            density = usage.density(m)
            hubs = (density > self.hub_above).nonzero()[:, 0].tolist()
            never = int((density == 0).sum())
            rounded = [round(v, 6) for v in density.tolist()]
            report["modalities"][m] = {"never_fired": never, "hubs": hubs, "density": rounded}
            lines.append(f"{m}: {never} of {len(dead)} never fired, {len(hubs)} on over {self.hub_above:.0%} of tokens")
        for m in usage.modalities:
            share = trainer.callback_metrics.get(f"val/dead/{m}")
            if share is not None:
                lines.append(f"{float(share):.1%} never fired on the {m} rows of the last validation")
        file = Path(self.file or Path(trainer.default_root_dir) / "latents.json")
        with disk_errors(file.parent), atomic_file(file) as temp:
            temp.write_text(json.dumps(report))
        said = "; ".join(lines)
        print(f"{module.member}: {said}" if module.member else said, flush=True)
