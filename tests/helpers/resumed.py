"""Trainings of SAEs with every kind of state, and, as a process of its own, what follows from their checkpoints.

``python -m tests.helpers.resumed FOLDER`` goes on with what :func:`run` left in a folder, and writes ``resumed.json``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mmsae.training import LitSAE
from tests.helpers.lit import Data, trainer
from tests.helpers.recipes import ROOT, small_model

SAVED, STEPS = 7, 10  # the helper's trainer writes every 7 steps
#: ``{name: (recipe, options of LitSAE)}``: thresholds, biases, quotas and frequencies, noise, atoms, points, the atoms'
#: start, drawn prefixes, masks.
KINDS = {
    "batch_topk": ("batch_topk", {}),
    "gba": ("gba", {}),
    "feature_choice": ("feature_choice", {"dead_after": 100}),
    "vsae": ("vsae", {}),
    "itda": ("itda", {}),
    "archetypal": ("archetypal", {}),
    "soft_decoder": ("topk", {"freeze": "soft_decoder", "dead_after": 100}),
    "matryoshka_sampled": ("matryoshka_sampled", {}),
    "mgsae": ("mgsae", {}),
}


class Losses(pl.Callback):
    """Every step's loss; with ``keep`` the checkpoint of step 7 stays beside the later one."""

    def __init__(self, keep: bool) -> None:
        self.losses: list[float] = []
        self.keep = keep

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if self.keep and trainer.global_step == SAVED + 1:
            shutil.copy(last, last.with_name("kept.ckpt"))


def run(root: Path, kind: str, ckpt: Path | None = None) -> tuple[list[float], list[int]]:
    """Losses of the steps that a training did, and how many latents its SAE has on in evaluation."""
    recipe, options = KINDS[kind]
    torch.manual_seed(0 if ckpt is None else 1)  # another start, which the checkpoint's replaces
    sae, losses = small_model(ROOT / "configs" / "sae" / f"{recipe}.yaml", d_in=10)
    for part in (sae.encoder, sae.selector):
        if hasattr(part, "every"):
            part.every = 3
    module, said = LitSAE(sae, losses, scheduler=None, **options), Losses(ckpt is None)
    trainer(root, STEPS, callbacks=[said]).fit(module, datamodule=Data(), ckpt_path=ckpt, weights_only=True)
    with torch.no_grad():
        on = [int(sae.eval().encode(Data().x[m], m).l0().sum()) for m in sae.modalities]
    return said.losses, on


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = {k: run(folder / f"{k}-again", k, folder / k / "checkpoints" / "kept.ckpt") for k in KINDS}
    (folder / "resumed.json").write_text(json.dumps(found))
