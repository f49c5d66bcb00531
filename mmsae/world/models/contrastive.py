"""The contrastive loop: a CLIP-like model, pairs in memory, and a state file from which a killed run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from mmsae.files import atomic_file
from mmsae.world.models.loop import Muon, Pairs, epoch_order, flip_and_shift


class Recipe(NamedTuple):
    """How to train.

    Attributes:
        steps: Optimiser steps.
        batch_size: Pairs a step.
        seed: Of order, captions and augmentation.
        lr: Peak learning rate of Muon (weight matrices and kernels).
        adam_lr: Peak learning rate of AdamW (embeddings, norms, biases, temperature).
        weight_decay: On everything of two or more dimensions.
        photo: Mirror and shift the images.
        bf16: Image tower under bfloat16 autocast.
    """

    steps: int
    batch_size: int
    seed: int
    lr: float
    adam_lr: float
    weight_decay: float
    photo: bool
    bf16: bool


def pair_loss(image: Tensor, text: Tensor, caption: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy in which equal captions share the target.

    Equal to the loss over all B x B logits with targets spread evenly over equal captions, at the cost of the U
    different ones: a column that stands for c texts counts c times in the softmax.

    Args:
        image: ``(B, d)`` unit embeddings.
        text: ``(U, d)`` unit embeddings of the different captions.
        caption: ``(B,)`` which of the U each image has.
        scale: Inverse temperature.
    """
    logits = scale * image @ text.T  # (B, U)
    count = torch.bincount(caption, minlength=len(text)).to(logits)
    right = logits.gather(1, caption[:, None]).mean()
    to_text = torch.logsumexp(logits + count.log(), 1).mean()
    to_image = (count * torch.logsumexp(logits, 0)).sum() / len(image)
    return (to_text + to_image) / 2 - right


def optimizers(model: nn.Module, r: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels, AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim >= 2 and "embedding" not in n]
    tables = [p for n, p in named if p.ndim >= 2 and "embedding" in n]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [{"params": tables, "weight_decay": r.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        Muon(matrices, lr=r.lr, weight_decay=r.weight_decay),
        torch.optim.AdamW(groups, lr=r.adam_lr, betas=(0.9, 0.98), fused=True),
    ]


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over 50 steps or a tenth, cosine down to .02."""
    warm = max(1, min(50, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class _Batches:
    """Batch ``step`` of the run, the same whether or not the steps before it were taken."""

    def __init__(self, pairs: Pairs, ids: Tensor, r: Recipe, device: torch.device) -> None:
        self.pairs, self.ids, self.r, self.device = pairs, ids, r, device
        self.per_epoch = len(pairs.images) // r.batch_size
        self.epoch, self.order = -1, np.empty(0, int)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images ``(B, 3, S, S)`` in [-2, 2], ``(U, L)`` tokens of the different captions, ``(B,)`` which of them."""
        p, r = self.pairs, self.r
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, epoch_order(p.group, r.seed, epoch)
        rows = self.order[k * r.batch_size : (k + 1) * r.batch_size]
        rng = np.random.default_rng([r.seed, 11, step])
        column = (rng.random(len(rows)) * p.counts[rows]).astype(int)
        texts, caption = np.unique(p.captions[rows, column], return_inverse=True)
        images = flip_and_shift(p.images[rows], rng) if r.photo else p.images[rows]
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)  # stays channels-last in memory
        x = x.float().sub_(127.5).div_(63.75)  # mean .5, std .25 of values in [0, 1]
        return x, self.ids[torch.from_numpy(texts)].to(self.device), torch.from_numpy(caption.ravel()).to(self.device)


def train(
    model: nn.Module,
    pairs: Pairs,
    ids: Tensor,
    r: Recipe,
    *,
    state_file: Path,
    identity: dict[str, Any],
    checkpoint_every: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train ``model`` in place.

    Args:
        model: open_clip model with ``encode_image``, ``encode_text``, ``logit_scale`` and an image tower ``visual``.
        pairs: The data.
        ids: ``(U, L)`` tokens of ``pairs.texts``.
        r: The recipe.
        state_file: If it is there and its identity is equal, training goes on from it to the same result, bit for bit
            on one CPU, as without the interruption; a state of another run is said and left unused.
        identity: What must be equal for that: data, model and recipe.
        checkpoint_every: Steps between two writes of the state file; 0: never.
        progress: Show a bar with loss and time left.

    Returns:
        ``{"loss": running mean, "curve": [[step, loss], ...], "first_step": where it started}``.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    device = next(model.parameters()).device
    opts = optimizers(model, r)
    peaks = [g["lr"] for o in opts for g in o.param_groups]
    first, curve = _load(state_file, identity, model, opts, device)
    groups = [g for o in opts for g in o.param_groups]  # loading makes new ones
    if progress and state_file.exists():
        print(f"going on from step {first} of {state_file}" if first else f"{state_file} is of another run: not used")
    batches = _Batches(pairs, ids, r, device)
    model.visual.to(memory_format=torch.channels_last)
    model.train()
    mean = curve[-1][1] if curve else math.nan
    bar = tqdm(range(first, r.steps), initial=first, total=r.steps, desc="training CLIP", disable=not progress)
    for step in bar:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, r.steps)
        x, tokens, caption = batches(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=r.bf16):
            image = model.encode_image(x)
        # The text tower stays in float32: at this size autocast makes it slower.
        text = normalize(model.encode_text(tokens), dim=1)
        loss = pair_loss(normalize(image.float(), dim=1), text, caption, model.logit_scale.exp())
        for o in opts:
            o.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}: lower the learning rate (now {r.lr:g})")
        mean = value if math.isnan(mean) else 0.95 * mean + 0.05 * value
        if (step + 1) % 20 == 0 or step + 1 == r.steps:
            curve.append([step + 1, mean])
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if checkpoint_every and (step + 1) % checkpoint_every == 0 and step + 1 < r.steps:
            _save(state_file, identity, model, opts, step + 1, curve)
    model.eval()
    return {"loss": mean, "curve": curve, "first_step": first}


def _save(path: Path, identity: dict, model: nn.Module, opts: list, step: int, curve: list) -> None:
    state = {
        "identity": json.dumps(identity, sort_keys=True),
        "step": step,
        "curve": curve,
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in opts],
    }
    with atomic_file(path) as temp:
        torch.save(state, temp)


def _load(
    path: Path, identity: dict, model: nn.Module, opts: list, device: torch.device
) -> tuple[int, list[list[float]]]:
    """The step to go on from (0 without a state of the same run) and the loss curve until there."""
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location=device, weights_only=True)
    if state["identity"] != json.dumps(identity, sort_keys=True):
        return 0, []
    model.load_state_dict(state["model"])
    for o, s in zip(opts, state["optimizers"], strict=True):
        o.load_state_dict(s)
    return state["step"], state["curve"]
