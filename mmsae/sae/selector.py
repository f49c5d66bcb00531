"""Selectors: which pre-codes become the code.

A selector has a *score*, by which entries are ranked or compared, and a *budget*: how many of them, along which axis.
What it keeps of an entry is the entry's value, without a sign unless the score is the absolute value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.kernels import Ranking, backend_for
from mmsae.sae.dictionary import Dictionary
from mmsae.sae.part import Part
from mmsae.sae.precodes import DensePreCodes, PreCodes, PursuitCodes, Score, stacked
from mmsae.types import InputError

AnyPreCodes = PreCodes | DensePreCodes
Selected = tuple[Tensor, Tensor | None]
"""``(values (N, k), indices (N, k))``, or ``(values (N, d_sae), None)`` for dense families."""
SCORES = ("value", "abs", "norm")


class SelectContext(NamedTuple):
    """What a selector may look at beside the pre-codes of some rows."""

    modality: str
    dictionary: Dictionary  #: That decodes the rows.
    target: Tensor  #: ``(N, d)`` the normalised rows.
    grad: Tensor | None = None  #: ``(N, d)`` gradient of the host's loss at the normalised rows, where the data has it.


class Selector(Part):
    """Base of selectors."""

    couples_batch = False  #: Whether the code of a row depends on the other rows of the batch in training.
    signed = False  #: Whether code values may be negative.
    by_place = False  #: Whether what is kept depends on the places of latents, which so cannot be moved or left out.
    alike = False  #: Whether rows of every modality are chosen from in the same way, and each by itself.
    by_norm = False  #: Whether what is chosen goes by pre-codes times the norms of their atoms.

    def build(self, d_sae: int, modalities: Sequence[str]) -> None:
        """Check against the number of latents, allocate state."""

    def forward(self, pre: AnyPreCodes, rows: SelectContext) -> Selected:
        """The code of some rows of one modality."""
        raise NotImplementedError

    def select(self, pres: Mapping[str, AnyPreCodes], rows: Mapping[str, SelectContext]) -> dict[str, Selected]:
        """The codes of a batch of every modality; by default each on its own, or all rows in one pass if that is the
        same and pays.
        """
        first = next(iter(rows.values()))
        if len(pres) > 1 and self.in_one_pass(first.target) and (whole := stacked(list(pres.values()))):
            counts = [len(context.target) for context in rows.values()]
            chosen = zip(*(t.split(counts) for t in self(whole, first)), strict=True)
            return dict(zip(pres, chosen, strict=True))
        return {m: self(pre, rows[m]) for m, pre in pres.items()}

    def in_one_pass(self, like: Tensor) -> bool:
        """Whether rows of several modalities, tensors like this one, are coded together for speed alone."""
        return self.alike and backend_for(like).fused


class Ranked(Selector):
    """Base of selectors that rank entries.

    Args:
        score: What is ranked. ``value``: the pre-code; ``abs``: its absolute value, and the sign is kept (AbsTopK,
            arXiv 2510.00404); ``norm``: the pre-code times the norm of its atom (the atoms' scale has no effect).
    """

    def __init__(self, score: str = "value") -> None:
        super().__init__()
        if score not in SCORES:
            raise InputError(f"score must be one of {', '.join(SCORES)}, not {score!r}")
        self.score_name, self.signed, self.by_norm = score, score == "abs", score == "norm"

    def config(self) -> dict[str, Any]:
        return {} if self.score_name == "value" else {"score": self.score_name}

    def score(self, rows: SelectContext) -> Score | None:
        """What is ranked of these rows; None: the pre-code itself."""
        if self.score_name == "abs":
            return Ranking(absolute=True)
        if self.score_name == "norm":
            return Ranking(factor=rows.dictionary.rows().detach().norm(dim=1))
        return None

    def keep(self, pre: AnyPreCodes, indices: Tensor, linear: Tensor | None = None) -> Tensor:
        """``(N, k)`` code values of chosen entries, with gradients for these only."""
        values = pre.at(indices, linear)
        return values if self.signed else values.relu()

    def above(self, pre: AnyPreCodes, rows: SelectContext, threshold: Tensor) -> Selected:
        """The entries whose score is above a threshold, one number or ``(d_sae,)``: a rule without other rows."""
        linear, indices, on = pre.above(threshold, self.score(rows))
        return self.keep(pre, indices, linear) * on, indices


class TopK(Ranked):
    """The k largest pre-codes of each row, ReLU'd; gradients reach the kept entries only (arXiv 2406.04093).

    With ``score="abs"`` it is AbsTopK (arXiv 2510.00404): the k entries of largest absolute value, sign kept.

    Args:
        k: Latents kept a row. A row with fewer than k positive pre-codes has L0 < k.
        strict: The published VL-SAE rule: keep entries strictly above the (k+1)-th largest, so that ties at the
            boundary keep fewer; needs k < d_sae. Without ties both rules are equal.
        score: What is ranked: ``value``, ``abs`` or ``norm``; see :class:`Ranked`.
    """

    name = "topk"

    def __init__(self, k: int = 32, strict: bool = False, score: str = "value") -> None:
        super().__init__(score)
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        if strict and score != "value":
            raise InputError(f"strict compares pre-codes, score {score!r} does not: give one of them")
        self.strict, self.alike = strict, type(self) is TopK and score != "norm"
        # a buffer, since it changes results and may be annealed; the host copy avoids a device sync in every step
        self.register_buffer("k_", torch.tensor(k))
        self._k = k

    @property
    def k(self) -> int:
        """Latents kept a row."""
        return self._k

    def set_k(self, k: int) -> None:
        """Change k (annealing)."""
        self.k_.fill_(k)
        self._k = k

    def loaded_(self) -> None:
        self._k = int(self.k_)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.loaded_()

    def config(self) -> dict[str, Any]:
        return {"k": self._k, "strict": self.strict, **super().config()}

    def build(self, d_sae: int, modalities: Sequence[str]) -> None:
        """Check that k is at most d_sae, and below it with ``strict``."""
        if self._k > d_sae or (self.strict and self._k == d_sae):
            why = " (strict needs k < d_sae)" if self.strict else ""
            raise InputError(f"k = {self._k} does not fit d_sae = {d_sae}{why}")

    def forward(self, pre: AnyPreCodes, rows: SelectContext) -> Selected:
        linear, indices = pre.topk(self._k + self.strict, self.score(rows))
        if not self.strict:
            return self.keep(pre, indices, linear), indices
        linear, order = linear.sort(dim=1, descending=True)
        indices = indices.gather(1, order)[:, :-1]
        above = linear[:, :-1] > linear[:, -1:]
        return self.keep(pre, indices, linear[:, :-1]) * above, indices


class ReLU(Selector):
    """Every positive pre-code; dense codes. Something else must make them sparse: an L1 term, or a bias controller."""

    name = "relu"

    def forward(self, pre: AnyPreCodes, rows: SelectContext) -> Selected:
        u = pre.dense()
        value = getattr(pre, "value", None)
        return (u.relu() if value is None else value * (u > 0)), None


class Pursued(Selector):
    """What the encoder has chosen by itself; the selector of pursuits, and of nothing else."""

    name = "pursued"

    def check(self, sae: Any) -> None:
        if not sae.encoder.is_pursuit:
            raise InputError(f"selector 'pursued' needs an encoder that chooses by itself, not {sae.encoder.name!r}")

    def forward(self, pre: PursuitCodes, rows: SelectContext) -> Selected:
        return pre.values, pre.indices
