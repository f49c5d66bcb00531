"""The training loop without a trainer, for small trainings within one process; ``mmsae fit`` is for all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mmsae.sae import SAE, LossContext, LossTerm, UsageTracker, total
from mmsae.training.adam import kept_by, with_atoms
from mmsae.training.freeze import Freeze
from mmsae.types import Tokens

Batch = Tokens | Mapping[str, Tensor]


def rise_and_fall(step: int, steps: int) -> float:
    """Factor of the learning rate: up over 20 steps, flat, down to 0 over the second half."""
    return min(1.0, (step + 1) / 20, 2 * (1 - step / steps))


def train(
    sae: SAE,
    losses: Sequence[LossTerm],
    batches: Iterator[Batch],
    steps: int,
    lr: float = 2e-3,
    seed: int = 0,
    rate: Callable[[int, int], float] = rise_and_fall,
    freeze: str = "",
) -> UsageTracker:
    """Train in place, one batch a step, with Adam; the normaliser has been fitted.

    An SAE without parameters (a dictionary that is built by selection) learns by its parts' own rules, and is done when
    its dictionaries are full.

    Args:
        sae: The SAE; it is left in eval mode.
        losses: Loss terms; their sum is minimised.
        batches: Activations of every step.
        steps: Number of steps.
        lr: Learning rate.
        seed: Of what loss terms draw.
        rate: Factor of the learning rate at a step of so many.
        freeze: What stays as random as it began, for controls; see :class:`mmsae.training.freeze.Freeze`.

    Returns:
        Which latents fired in the training.
    """
    for term in losses:
        term.check(sae)
    kept = Freeze(freeze)
    kept.build(sae)
    usage = UsageTracker(sae.d_sae, sae.modalities)
    weights = [p for p in sae.parameters() if p.requires_grad]
    optimizer = with_atoms(torch.optim.Adam(weights, lr=lr, fused=True), sae, tangent=True) if weights else None
    in_step = kept_by(optimizer)
    sae.train()
    for step in range(steps):
        batch = next(batches)
        tokens = batch if isinstance(batch, Tokens) else Tokens.pooled(dict(batch))
        outputs = sae(tokens)
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, steps)
            context = LossContext(sae, usage, step / steps, step, seed)
            loss = total([term(outputs, context) for term in losses])
            optimizer.zero_grad()
            loss.backward()
            sae.remove_parallel_grad_(in_step.tangent)
            optimizer.step()
        usage.update({m: out.codes for m, out in outputs.items()})
        sae.grow_(tokens, outputs)
        sae.after_step_(in_step.unit)
        if optimizer is None and all(d.full for d in sae.dictionaries.values()):
            break
        kept.after_step_(sae)
    sae.eval()
    return usage
