"""Training of the auxiliary aligner of VL-SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mmsae.sae.aligner import Aligner
from mmsae.training.resume import check
from mmsae.types import IMAGE, TEXT, InputError, Tokens


class LitAligner(pl.LightningModule):
    """Trains an :class:`~mmsae.sae.aligner.Aligner` on paired pooled states.

    The batch is the set of negatives, so it should be large (2,048 in the published runs).

    Args:
        aligner: Built, or sized by the datamodule's ``d_in``.
        lr: Peak learning rate of AdamW, which falls as a cosine over the epochs.
        weight_decay: Weight decay of AdamW.
    """

    def __init__(self, aligner: Aligner, lr: float = 5e-5, weight_decay: float = 0.01):
        super().__init__()
        self.aligner, self.lr, self.weight_decay = aligner, lr, weight_decay
        self.register_buffer("best", torch.tensor(float("inf")))

    def setup(self, stage: str) -> None:
        """Size the aligner from the datamodule."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        widths = data.d_in if isinstance(data.d_in, dict) else {m: data.d_in for m in (IMAGE, TEXT)}
        if not self.aligner.d_in:
            self.aligner.build(widths)
        elif widths != self.aligner.d_in:
            raise InputError(f"the data has widths {widths}, the aligner takes {self.aligner.d_in}")

    def _recipe(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("lr", "weight_decay")}
        own |= {f"aligner.{name}": getattr(self.aligner, name) for name in ("tau", "normalize")}
        return own | {"trainer.max_epochs": self.trainer.max_epochs}  # the length of the cosine

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mmsae"] = {"recipe": self._recipe()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with other options (see :mod:`mmsae.training.resume`)."""
        check(checkpoint.get("mmsae", {}).get("recipe", {}), self._recipe(), fitting=True)

    def _step(self, batch: Tokens, stage: str) -> Tensor:
        if not batch.paired():
            raise InputError("an aligner is trained on pairs: one image and one text row per item, in equal order")
        terms = self.aligner.losses(batch.x)
        loss = torch.stack(list(terms.values())).sum()
        values = {f"{stage}/loss": loss, **{f"{stage}/{n}": v for n, v in terms.items()}}
        self.log_dict(values, batch_size=len(batch.x[IMAGE]), prog_bar=True, sync_dist=stage == "val")
        return loss

    def training_step(self, batch: Tokens, batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Tokens, batch_idx: int) -> None:
        self._step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Write ``<default_root_dir>/aligner`` where the validation loss is the lowest so far."""
        loss = float(self.trainer.callback_metrics["val/loss"])
        if self.trainer.sanity_checking or not loss < float(self.best):
            return
        self.best.fill_(loss)
        if self.trainer.is_global_zero:
            self.aligner.save_pretrained(Path(self.trainer.default_root_dir) / "aligner")

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        epochs = max(1, self.trainer.max_epochs or 1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)]
