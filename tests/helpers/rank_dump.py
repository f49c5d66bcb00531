"""A callback that writes what each rank ends with; named by class path, so it has a module of its own."""

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
