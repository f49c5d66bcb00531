"""Callbacks that write what each rank does and ends with; named by class path, so they have a module of their own."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import torch


class DumpRanks(pl.Callback):
    """``<default_root_dir>/rank-N.pt``: the state, which parameters had gradients, and whether DDP looks for them."""

    def __init__(self):
        self.without_grad = set()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.without_grad |= {n for n, p in module.named_parameters() if p.grad is None}

    def on_train_end(self, trainer, module):
        torch.save(
            {
                "state": module.state_dict(),
                "without_grad": sorted(self.without_grad),
                "find_unused": getattr(trainer.model, "find_unused_parameters", None),
                "world": trainer.world_size,
            },
            Path(trainer.default_root_dir) / f"rank-{trainer.global_rank}.pt",
        )


class DumpRows(pl.Callback):
    """``<default_root_dir>/rows-STEP-RANK.pt``: the uids of every step, from that on at which a rank began, and its
    state then.

    Batches need uids (``--data.uids true``). The trainer is stopped before step ``stop``, as by Ctrl-C.
    """

    def __init__(self, stop: int = -1):
        self.stop, self.rows = stop, {}

    def on_train_start(self, trainer, module):
        self.file = Path(trainer.default_root_dir) / f"rows-{trainer.global_step}-{trainer.global_rank}.pt"
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
        self.began = {"state": copy.deepcopy(module.state_dict()), "optimizer": optimizer}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.stop:
            raise KeyboardInterrupt
        item = next(iter(batch.item.values()))
        self.rows[trainer.global_step] = [batch.uids[i] for i in item.tolist()]
        torch.save({"rows": self.rows, **self.began}, self.file)
