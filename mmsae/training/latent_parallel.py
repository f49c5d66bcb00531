"""A strategy for dictionaries that one device cannot hold: ranks share the latents, and read the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from mmsae.training.checkpoint import AtomicCheckpointIO


class LatentParallel(DDPStrategy):
    """Tensor parallelism over latents (:mod:`mmsae.sae.latent_shard`), ``--trainer.strategy`` with its class path.

    Each of R ranks has an R-th of the encoder, the atoms, their gradients and the optimiser's moments. A batch is that
    of one rank (``data.batch_size`` rows, not R times as many), and the SAE is that of one rank, to rounding.

    Checkpoints are those of a run on one device: rank 0 gathers them part by part in its main memory, and whoever goes
    on takes its own part, on any number of ranks that divides the latents, or on one device without this strategy.
    """

    shares_latents = True

    def __init__(self) -> None:
        super().__init__()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All ranks read the same batches."""
        return {"num_replicas": 1, "rank": 0}

    def configure_ddp(self) -> None:
        """Nothing: gradients are of this rank's latents, and what all ranks have gets the same gradient everywhere."""
        self.precision_plugin.clip_grad_by_norm = self._clip

    @torch.no_grad()
    def _clip(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip gradients by their norm over all latents."""
        axes, shard = self.lightning_module.latent_axes(), self.lightning_module.sae.shard
        named = {p: f"sae.{name}" for name, p in self.lightning_module.sae.named_parameters()}
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        apart, alike = torch.zeros((), device=self.root_device), torch.zeros((), device=self.root_device)
        for p in params:
            (apart if named[p] in axes else alike).add_(p.grad.square().sum())
        norm = (shard.total(apart) + alike).sqrt()
        factor = (clip_val / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for p in params:
            p.grad.mul_(factor)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Gather the checkpoint of all latents, and have rank 0 write it."""
        shard = self.lightning_module.sae.shard
        self._each_part(checkpoint, shard.gathered)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint of all latents, of which this rank's are read."""
        if isinstance(self.checkpoint_io, AtomicCheckpointIO):
            self.checkpoint_io.mapped = True
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        shard = self.lightning_module.sae.shard
        self._each_part(
            checkpoint, lambda t, axis: shard.mine(t, axis).clone() if t.shape[axis] == shard.d_sae else t
        )  # another size is for the module to refuse
        return checkpoint

    def _each_part(self, checkpoint: dict[str, Any], change: Callable[[Tensor, int], Tensor | None]) -> None:
        """Replace every tensor of a checkpoint that has an entry for each latent."""
        for where, key, axis in self._parts(checkpoint):
            where[key] = change(where[key], axis)

    def _parts(self, checkpoint: dict[str, Any]) -> Iterator[tuple[dict[Any, Any], Any, int]]:
        axes = self.lightning_module.latent_axes()
        checkpoint["state_dict"] = dict(checkpoint["state_dict"])
        for name in [n for n in checkpoint["state_dict"] if n in axes]:
            yield checkpoint["state_dict"], name, axes[name]
        weights = [f"sae.{name}" for name, _ in self.lightning_module.sae.named_parameters()]
        for optimizer in checkpoint.get("optimizer_states", []):
            optimizer["state"] = {at: dict(moments) for at, moments in optimizer["state"].items()}
            for at, moments in optimizer["state"].items():
                if weights[at] in axes:
                    for name in [n for n, v in moments.items() if isinstance(v, Tensor) and v.dim()]:
                        yield moments, name, axes[weights[at]]
