"""BatchTopK (arXiv 2412.06410), which is Mutual Choice too (arXiv 2411.02124): one budget for a whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmsae.kernels import backend_for
from mmsae.sae.normaliser import all_reduce
from mmsae.sae.selector import AnyPreCodes, Ranked, SelectContext, Selected
from mmsae.types import InputError


class Thresholded(Ranked):
    """Base of selectors whose budget couples rows in training, and which use running thresholds in evaluation.

    A batch's threshold is the smallest score that it kept. The running one, of every modality, is a bias-corrected
    exponential mean of those, so that it is right from the first step on: ``mean = sum / weight`` with ``sum = decay *
    sum + (1 - decay) * m`` and ``weight`` alike. Ranks count alike.

    Args:
        decay: Of the running thresholds, for every step.
        score: What is ranked; see :class:`Ranked`.
    """

    couples_batch = True

    def __init__(self, decay: float = 0.99, score: str = "value") -> None:
        super().__init__(score)
        if not 0 <= decay < 1:
            raise InputError(f"decay must be at least 0 and below 1, not {decay}")
        self.decay = decay

    def build(self, d_sae: int, modalities: Sequence[str]) -> None:
        """Allocate the running thresholds, ``(modalities, 1)``."""
        self._allocate(modalities, 1)

    def _allocate(self, modalities: Sequence[str], width: int) -> None:
        self.modalities = tuple(modalities)
        self.register_buffer("sum_", torch.zeros(len(modalities), width))
        self.register_buffer("weight_", torch.zeros(len(modalities), width))

    def threshold(self, modality: str) -> Tensor:
        """Running threshold of a modality, ``(1,)`` or ``(d_sae,)``; what was never seen has infinity.

        Raises:
            InputError: No training step was seen, so no threshold is known.
        """
        i = self.modalities.index(modality)
        if not self.weight_[i].any():
            raise InputError(
                f"selector {self.name!r} has seen no {modality} rows in training, so it has no threshold yet: train it"
            )
        return torch.where(self.weight_[i] > 0, self.sum_[i] / self.weight_[i], torch.inf)

    @torch.no_grad()
    def _observe(self, modality: str, least: Tensor) -> None:
        """Take a batch's thresholds into the running ones; infinite where nothing was kept."""
        i = self.modalities.index(modality)
        seen = torch.isfinite(least).to(self.sum_.dtype)
        total = torch.where(seen > 0, least, 0.0).to(self.sum_.dtype)
        all_reduce(total, seen)
        known = seen > 0
        decay = torch.where(known, self.decay, 1.0)
        self.sum_[i] = decay * self.sum_[i] + (1 - decay) * total / seen.clamp(min=1)
        self.weight_[i] = decay * self.weight_[i] + (1 - decay) * known

    def _mask(self, scores: Tensor, modality: str) -> Tensor:
        """``(N, d_sae)`` bool: what a training batch keeps of its positive scores."""
        raise NotImplementedError

    def _least(self, kept: Tensor) -> Tensor:
        """Thresholds of a batch: the smallest kept score, given ``(N, d_sae)`` scores, infinite where not kept."""
        return kept.min().reshape(1)

    def forward(self, pre: AnyPreCodes, rows: SelectContext) -> Selected:
        if not self.training:
            return self.above(pre, rows, self.threshold(rows.modality).to(rows.target.device))
        with torch.no_grad():
            linear, indices, on, least = self._choose(pre, rows)
            self._observe(rows.modality, least)
        return self.keep(pre, indices, linear) * on, indices

    def _choose(self, pre: AnyPreCodes, rows: SelectContext) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """What a training batch keeps: linear parts (if known), ids and whether they count, and its thresholds.

        All but thresholds are ``(N, k)``.
        """
        scores, modality = pre.scores(self.score(rows)), rows.modality
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        on = self._mask(scores, modality) & (scores > 0)
        least = self._least(torch.where(on, scores, torch.inf))
        width = max(1, int(on.sum(1).max())) if len(on) else 1
        indices = torch.where(on, scores, -torch.inf).topk(width, dim=1, sorted=False).indices
        return None, indices, on.gather(1, indices), least


class BatchTopK(Thresholded):
    """The ``k * N`` largest entries of the N rows of a modality, in training; entries above a threshold, after it.

    The budget is counted for every modality by itself, so that a modality of larger scale does not take the other's.

    Args:
        k: Mean number of latents of a row; need not be whole (``int(k * N)`` entries are kept).
        decay: Of the running thresholds, for every step.
        score: What is ranked; see :class:`Ranked`.
    """

    name = "batch_topk"

    def __init__(self, k: float = 32, decay: float = 0.99, score: str = "value") -> None:
        super().__init__(decay, score)
        if k <= 0:
            raise InputError(f"k must be above 0, not {k}")
        self.register_buffer("k_", torch.tensor(float(k)))
        self._k = float(k)

    @property
    def k(self) -> float:
        """Mean number of latents of a row."""
        return self._k

    def set_k(self, k: float) -> None:
        """Change k (annealing)."""
        self.k_.fill_(k)
        self._k = float(k)

    def loaded_(self) -> None:
        self._k = float(self.k_)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.loaded_()

    def config(self) -> dict[str, Any]:
        return {"k": self._k, "decay": self.decay, **super().config()}

    def build(self, d_sae: int, modalities: Sequence[str]) -> None:
        """Check that k is at most d_sae; allocate the running thresholds."""
        if self._k > d_sae:
            raise InputError(f"k = {self._k:g} does not fit d_sae = {d_sae}")
        super().build(d_sae, modalities)

    def _choose(self, pre: AnyPreCodes, rows: SelectContext) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        if type(self) is not BatchTopK:
            return super()._choose(pre, rows)
        score, backend = self.score(rows), backend_for(rows.target)
        if found := pre.largest(int(self._k * len(rows.target)), score):
            return found
        if not backend.fused or not int(self._k * len(rows.target)):
            return super()._choose(pre, rows)
        scores = pre.scores(score)
        least = backend.threshold(scores, self._budget(scores))  # where entries are equal at its end, all stay
        return None, *backend.above(scores, least, inclusive=True), least.reshape(1)

    def _budget(self, scores: Tensor) -> int:
        return min(int(self._k * len(scores)), scores.numel())

    def _mask(self, scores: Tensor, modality: str) -> Tensor:
        on = torch.zeros_like(scores, dtype=torch.bool).view(-1)
        best = scores.reshape(-1).topk(self._budget(scores), sorted=False).indices
        return on.index_fill_(0, best, True).view_as(scores)
