"""Group bias adaptation (GBA, arXiv 2506.14002): feedback on the biases sets how often latents fire, and no penalty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import SAEEncoder
from mmsae.sae.normaliser import all_reduce
from mmsae.sae.precodes import DensePreCodes, PreCodes
from mmsae.sae.selector import ReLU
from mmsae.types import InputError

RESPONSES = ("biased", "unbiased")


class ScaledDictionary(Dictionary):
    """Atoms ``a_i w_i``: unit rows ``weight`` that a tied encoder reads, and a trained scale of each.

    Scales may hide shrinkage of the codes: report their norm.

    Args:
        bias: Whether decoding adds a bias.
    """

    name = "scaled"

    def __init__(self, bias: bool = True) -> None:
        super().__init__("unit", bias)

    def config(self) -> dict[str, Any]:
        return {"bias": self.use_bias}

    def check(self, sae: Any) -> None:
        if not isinstance(sae.encoder, GroupBias):
            raise InputError(f"dictionary 'scaled' goes with encoder 'gba', and not with {sae.encoder.name!r}")

    def build(self, d_in: int, d_sae: int) -> None:
        """Allocate random directions, and scales of 1."""
        super().build(d_in, d_sae)
        self.scale = nn.Parameter(torch.ones(d_sae))

    @property
    def unit_rows(self) -> bool:
        return False

    def rows(self) -> Tensor:
        return self.weight * self.scale[:, None]


class GroupBias(SAEEncoder):
    """``y = (x - b_dec) W.T + b`` with the dictionary's own unit rows W, and a bias that no gradient moves.

    Latents lie in groups, each with a target frequency, geometric from ``highest`` to ``lowest``. After every ``every``
    steps, with the share p of the window's rows on which a latent fired (y > 0), its largest pre-code r (0 where none
    was positive) and the mean T of r over the latents of the group that have r > 0::

        p > target:  b = max(b - lower * r, -1)
        p < silent:  b = min(b + lift * T, 0)

    A target is a ceiling, not a set-point: stationary data settle below it. Modalities are counted by themselves, so
    that a rare one does not set the other's frequency: one bias for all is lowered where any modality is above the
    target, by its largest pre-code, and raised where no modality fires. The range [-1, 0] presumes rows of norm 1 about
    the decoder's bias. A window of n rows measures a target only where ``n * lowest`` is well above 1. One group is BA.

    [R] The text that was available leaves open: the highest target (.5 or .1), which latents form a group (here
    neighbours by id), and that statistics are of the normalised rows, with the rows of W as the last step left them.

    Args:
        groups: Number of groups.
        highest: Target frequency of the first group.
        lowest: Target frequency of the last one.
        every: Optimiser steps of a window.
        lower: Share of its largest pre-code by which an over-active latent's bias falls; below 1 this never silences.
        lift: Share of its group's mean largest pre-code by which a silent latent's bias rises.
        silent: Frequency below which a latent is silent.
        response: What a latent that fires gives: ``biased`` y, or ``unbiased`` y - b (later JumpReLU form [R]).
        per_modality: Whether every modality has biases of its own.
    """

    name = "gba"
    sets_frequency = True
    file_names: ClassVar[Mapping[str, tuple[str, bool]]] = {}

    def __init__(
        self,
        groups: int = 10,
        highest: float = 0.1,
        lowest: float = 1e-3,
        every: int = 50,
        lower: float = 0.01,
        lift: float = 0.01,
        silent: float = 1e-6,
        response: str = "biased",
        per_modality: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < lowest <= highest <= 1:
            raise InputError(f"target frequencies must satisfy 0 < lowest <= highest <= 1, not {lowest} and {highest}")
        if not 0 < lower < 1 or lift <= 0:
            raise InputError(f"lower must lie between 0 and 1 and lift be above 0, not {lower} and {lift}")
        if groups < 1 or every < 1:
            raise InputError(f"groups and every must be at least 1, not {groups} and {every}")
        if response not in RESPONSES:
            raise InputError(f"response must be one of {', '.join(RESPONSES)}, not {response!r}")
        self.groups, self.highest, self.lowest, self.every = groups, highest, lowest, every
        self.lower, self.lift, self.silent = lower, lift, silent
        self.response, self.per_modality = response, per_modality

    def config(self) -> dict[str, Any]:
        names = "groups highest lowest every lower lift silent response per_modality"
        return {name: getattr(self, name) for name in names.split()}

    def check(self, sae: Any) -> None:
        if type(sae.selector) is not ReLU:
            budget = f" (k = {sae.selector.k:g})" if hasattr(sae.selector, "k") else ""
            raise InputError(
                f"encoder 'gba' sets how often latents fire by their biases: its selector is 'relu', and not "
                f"{sae.selector.name!r}{budget}"
            )
        for key, d in sae.dictionaries.items():
            if not isinstance(d, Dictionary) or d.norm != "unit":
                raise InputError(
                    f"encoder 'gba' reads the dictionary's unit rows: dictionary {key!r} must be 'scaled' or of norm "
                    f"'unit', not {d.name!r} of norm {getattr(d, 'norm', None)!r}"
                )

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        """Allocate biases of 0, the groups' targets and an empty window; all of it buffers."""
        if self.groups > d_sae:
            raise InputError(f"{self.groups} groups do not fit d_sae = {d_sae}")
        self.modalities = tuple(d_in)
        ladder = torch.linspace(0, 1, self.groups)
        self.register_buffer("bias", torch.zeros(len(d_in) if self.per_modality else 1, d_sae))
        self.register_buffer("group", torch.arange(d_sae) * self.groups // d_sae)
        self.register_buffer("target", self.highest * (self.lowest / self.highest) ** ladder)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("count", torch.zeros(len(d_in), 1, dtype=torch.long))  # rows of the window
        self.register_buffer("positives", torch.zeros(len(d_in), d_sae, dtype=torch.long))
        self.register_buffer("largest", torch.zeros(len(d_in), d_sae))  # pre-code, 0 where none was positive

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> PreCodes | DensePreCodes:
        i = self.modalities.index(modality)
        bias = self.bias[i if self.per_modality else 0]
        pre = PreCodes.centred(x, dictionary.bias, dictionary.weight, bias)
        if self.training:
            self._observe(i, pre.dense().detach())
        return pre if self.response == "biased" else DensePreCodes(pre.dense(), pre.dense() - bias)

    @torch.no_grad()
    def _observe(self, i: int, y: Tensor) -> None:
        """Take the pre-codes of a batch of a modality into the window, those of all ranks."""
        positives = (y > 0).sum(0)
        count = positives.new_tensor([len(y)])
        largest = y.amax(0).relu() if len(y) else y.new_zeros(y.shape[1])
        all_reduce(count, positives)
        all_reduce(largest, op="max")
        self.count[i] += count
        self.positives[i] += positives
        self.largest[i] = torch.maximum(self.largest[i], largest.to(self.largest.dtype))

    @torch.no_grad()
    def after_step_(self) -> None:
        """Move the biases and clear the window, every so many steps; nothing waits for the device."""
        self.steps += 1
        due = self.steps % self.every == 0
        self.bias.copy_(torch.where(due, self._moved(), self.bias))
        for window in (self.count, self.positives, self.largest):
            window.masked_fill_(due, 0)

    def _moved(self) -> Tensor:
        """The biases after what the window holds."""
        p, r, seen = self.positives / self.count.clamp(min=1), self.largest, self.count > 0
        if not self.per_modality:
            p, r, seen = p.amax(0, keepdim=True), r.amax(0, keepdim=True), seen.any(0, keepdim=True)
        member = (self.group == torch.arange(self.groups, device=r.device)[:, None]).to(r.dtype)  # (groups, d_sae)
        mean = (r @ member.T) / ((r > 0).to(r.dtype) @ member.T).clamp(min=1)
        lowered = torch.maximum(self.bias - self.lower * r, self.bias.new_tensor(-1.0))
        raised = (self.bias + self.lift * mean[:, self.group]).clamp(max=0)
        bias = torch.where(p > self.target[self.group], lowered, self.bias)
        return torch.where(seen & (p < self.silent), raised, bias)
