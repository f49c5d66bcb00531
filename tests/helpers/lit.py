"""LitSAE on pairs in memory, whose loader has state, and a trainer that says nothing."""

import lightning.pytorch as pl
import torch

from mmsae import SAE
from mmsae.sae import AuxK, CodeCosine, Dictionary, Normaliser, Reconstruction, TopK
from mmsae.training import LitSAE, RunCheckpoint
from mmsae.types import Tokens


class Loader:
    """Seeded batches with ``__len__`` and state, as the store's loader has."""

    def __init__(self, x, batch, seed):
        self.x, self.batch, self.seed, self.epoch, self.at = x, batch, seed, 0, 0

    def __len__(self):
        return len(self.x["image"]) // self.batch

    def __iter__(self):
        start, self.at = self.at % len(self), self.at % len(self)
        order = torch.randperm(len(self.x["image"]), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for i in range(start, len(self)):
            self.at = i + 1
            if self.at == len(self):
                self.epoch += 1
            rows = order[i * self.batch : (i + 1) * self.batch]
            yield Tokens.pooled({m: v[rows] for m, v in self.x.items()})

    def state_dict(self):
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state):
        self.epoch, self.at = state["epoch"], state["at"]


class Data(pl.LightningDataModule):
    def __init__(self, n=400, d=10, sites=None):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        shared = torch.randn(n, d, generator=g)
        self.x = {m: shared + s + 0.2 * torch.randn(n, d, generator=g) for m, s in (("image", 1.0), ("text", -1.0))}
        self.d_in, self.sites = d, sites or {}

    def train_dataloader(self):
        return Loader(self.x, 40, 0)

    def val_dataloader(self):
        return Loader(self.x, 50, 1)


def lit(seed=0, d_in=None, centre=True, **kw):
    torch.manual_seed(seed)
    sae = SAE(
        d_in, 48, normaliser=Normaliser(unit_in=True, centre=centre, unit_out=True), selector=TopK(4),
        dictionaries={m: Dictionary() for m in ("image", "text")},
    )  # fmt: skip
    return LitSAE(sae, [Reconstruction(), AuxK(dead_after=200), CodeCosine()], **kw)


def trainer(root, steps, **kw):
    callbacks = [RunCheckpoint(every_n_train_steps=7, dirpath=str(root / "checkpoints")), *kw.pop("callbacks", [])]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    return pl.Trainer(
        max_steps=steps, max_epochs=-1, default_root_dir=str(root), callbacks=callbacks,
        **({"accelerator": "cpu", "gradient_clip_val": 1.0} | quiet | kw),
    )  # fmt: skip


class Spoil(pl.Callback):
    """Makes the weights of one member infinite after a step."""

    def __init__(self, member, step):
        self.member, self.step = member, step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and self.member in module.each():
            with torch.no_grad():
                module.each()[self.member].sae.encoder.weight.fill_(float("inf"))


class StopAt(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt
