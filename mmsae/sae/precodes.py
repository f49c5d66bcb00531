"""Pre-codes: what an encoder says of rows, before anything is selected.

They are not computed until somebody asks: a selector can rank without keeping the (N, d_sae) product and take gradients
for the entries that it kept, and a loss can ask for the columns that it needs. Encoders with more than one head have
:class:`DensePreCodes`; encoders that choose by themselves have :class:`PursuitCodes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmsae.kernels import (
    Largest,
    Ranking,
    backend_for,
    chunked_above,
    chunked_largest,
    chunked_topk,
    dense_columns,
    dense_linear,
    pays,
    raw_product,
    sampled_linear,
)
from mmsae.kernels.backend import Score

#: Of the gradient of a centre on the CPU, where one sum over all latents rounds five times as much; and much of it
#: cancels against the decoder's.
PARTS = 32


def identity(u: Tensor) -> Tensor:
    """No activation."""
    return u


@dataclass
class PreCodes:
    """Pre-codes ``u = act((x @ weight.T) * scale + bias)``, not yet computed.

    The gradient of ``centre``, which was taken off every row, is that of the pre-codes' sums over rows, through the
    weights: a product with one vector, where the gradient of every row would cost as much as decoding it.
    """

    x: Tensor  #: ``(N, d)``.
    weight: Tensor  #: ``(d_sae, d)``.
    bias: Tensor | None  #: ``(d_sae,)`` or None.
    act: Callable[[Tensor], Tensor] = identity  #: Elementwise, non-decreasing.
    #: ``(N, 1)`` 1 for rows that may be coded and 0 for rows that carry nothing, or None (all may).
    valid: Tensor | None = None
    scale: Tensor | None = None  #: ``(d_sae,)`` factor of each latent, or None (1).
    precision: str | None = None  #: Of the product's operands; see :class:`mmsae.SAE`. Chosen entries have float32's.
    centre: Tensor | None = None  #: ``(d,)`` what was taken off every row of ``x``, which knows of no gradient to it.
    _dense: Tensor | None = field(default=None, repr=False)
    _offset: Tensor | None = field(default=None, repr=False)

    @classmethod
    def centred(cls, x: Tensor, centre: Tensor | None, weight: Tensor, bias: Tensor | None) -> PreCodes:
        """``(x - centre) @ weight.T + bias``, not yet computed; None: nothing is taken off."""
        return cls(x if centre is None else x - centre.detach(), weight, bias, centre=centre)

    def dense(self) -> Tensor:
        """``(N, d_sae)`` pre-codes, computed once."""
        if self._dense is None:
            self._dense = self._finish(dense_linear(self.x, self.weight, self.precision), self._biases(), self.scale)
        return self._dense

    def columns(self, ids: Tensor) -> Tensor:
        """``(N, len(ids))`` pre-codes of some latents."""
        bias = self._biases()
        bias = None if bias is None else bias.index_select(0, ids)
        linear = dense_columns(self.x, self.weight, ids, self.precision)
        return self._finish(linear, bias, None if self.scale is None else self.scale.index_select(0, ids))

    @torch.no_grad()
    def scores(self, score: Score | None = None) -> Tensor:
        """``(N, d_sae)`` what is ranked, without gradients: for selectors that compare rows or latents."""
        if backend_for(self.x).fused:
            linear = raw_product(self.x, self.weight, self.bias, self.scale, self.precision)
            return self._ranked(score)(linear, slice(None))
        u = self.dense().detach()
        return u if score is None else score(u, slice(None))

    def rows(self, which: slice) -> PreCodes:
        """The pre-codes of some rows."""
        valid, dense = (None if t is None else t[which] for t in (self.valid, self._dense))
        return replace(self, x=self.x[which], valid=valid, _dense=dense)  # and the same offset

    def topk(self, k: int, score: Score | None = None) -> tuple[Tensor, Tensor]:
        """Linear parts (before ``act``) and ids, both ``(N, k)``, of the k largest of each row; no gradients.

        ``score`` is what is ranked (default: the pre-codes).
        """
        ranked = None if score is None else self._ranked(score)  # act keeps the order
        return chunked_topk(self.x, self.weight, self.bias, k, ranked, self.scale, self.precision)

    def above(self, threshold: Tensor, score: Score | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Linear parts, ids and which of them count, all ``(N, k)``, of the entries whose score is above a threshold.

        ``threshold`` is one number or ``(d_sae,)``; k is the most that a row has. No gradients.
        """
        ranked = self._ranked(score)
        return chunked_above(self.x, self.weight, self.bias, threshold, ranked, self.scale, self.precision)

    def largest(self, budget: int, score: Score | None = None) -> Largest | None:
        """The ``budget`` largest positive scores of all rows; None where :meth:`scores` are ranked as fast."""
        if backend_for(self.x).name != "torch" or not pays(self.x.device, len(self.weight)):
            return None
        ranked = self._ranked(score)
        return chunked_largest(self.x, self.weight, self.bias, budget, ranked, self.scale, self.precision)

    def at(self, indices: Tensor, linear: Tensor | None = None) -> Tensor:
        """``(N, k)`` pre-codes of chosen latents, with gradients for these entries only; ``linear`` if known."""
        linear = sampled_linear(self.x, self.weight, self._biases(), indices, linear, self.scale)
        return self._activate(linear, self.valid)

    def _biases(self) -> Tensor | None:
        """``bias`` with the gradient to ``centre``."""
        if self.centre is None or not (self.centre.requires_grad and torch.is_grad_enabled()):
            return self.bias
        if self._offset is None:  # made once, so that its backward pass is one
            self._offset = _Centred.apply(self.bias, self.centre, self.weight)
        return self._offset

    def _ranked(self, score: Score | None) -> Score:
        if (score is None or isinstance(score, Ranking)) and self.act is identity and self.valid is None:
            return score or Ranking()  # kernels can see through it

        def ranked(linear: Tensor, rows: slice) -> Tensor:
            u = self._activate(linear, None if self.valid is None else self.valid[rows])
            return u if score is None else score(u, rows)

        return ranked

    def _finish(self, linear: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        linear = linear if scale is None else linear * scale
        return self._activate(linear if bias is None else linear + bias, self.valid)

    def _activate(self, linear: Tensor, valid: Tensor | None) -> Tensor:
        u = self.act(linear)
        return u if valid is None else u * valid


class _Centred(torch.autograd.Function):
    """``bias - weight @ (centre - c)`` at ``c = centre``, whose value and gradient to ``weight`` need no product."""

    @staticmethod
    def forward(ctx, bias: Tensor | None, centre: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.new_zeros(len(weight)) if bias is None else bias

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (weight,) = ctx.saved_tensors
        if weight.device.type == "cpu":
            pairs = zip(grad.chunk(PARTS), weight.chunk(PARTS), strict=True)
            summed = torch.stack([g @ w for g, w in pairs]).sum(0)
        else:
            summed = torch.mv(weight.t(), grad)  # which is two operations, and grad @ weight three
        return grad if ctx.needs_input_grad[0] else None, summed.neg_(), None


@dataclass
class DensePreCodes:
    """Pre-codes that an encoder with several heads has computed; the same interface as :class:`PreCodes`."""

    u: Tensor  #: ``(N, d_sae)`` what is ranked and compared with thresholds.
    value: Tensor | None = None  #: ``(N, d_sae)`` what is kept of a chosen entry, where that is not ``u``.
    extras: Mapping[str, Any] = field(default_factory=dict)  #: What losses of the method need: means, variances, gates.

    def dense(self) -> Tensor:
        """``(N, d_sae)`` pre-codes."""
        return self.u

    def columns(self, ids: Tensor) -> Tensor:
        """``(N, len(ids))`` pre-codes of some latents."""
        return self.u[:, ids]

    def rows(self, which: slice) -> DensePreCodes:
        """The pre-codes of some rows; without extras."""
        return DensePreCodes(self.u[which], None if self.value is None else self.value[which])

    @torch.no_grad()
    def scores(self, score: Score | None = None) -> Tensor:
        """``(N, d_sae)`` what is ranked, without gradients."""
        u = self.u.detach()
        return u if score is None else score(u, slice(None))

    @torch.no_grad()
    def topk(self, k: int, score: Score | None = None) -> tuple[Tensor, Tensor]:
        """Entries of ``u`` and ids, both ``(N, k)``, of the k largest of each row; no gradients."""
        indices = backend_for(self.u).topk(self.scores(score), k)[1]
        return self.u.gather(1, indices), indices

    @torch.no_grad()
    def above(self, threshold: Tensor, score: Score | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of ``u``, ids and which of them count, all ``(N, k)``; see :meth:`PreCodes.above`."""
        ranked = self.scores(score)
        on = ranked > threshold
        order = torch.where(on, ranked, -torch.inf).topk(most(on), dim=1, sorted=False).indices
        return self.u.gather(1, order), order, on.gather(1, order)

    def largest(self, budget: int, score: Score | None = None) -> None:
        """Nothing: the scores are there already; see :meth:`PreCodes.largest`."""

    def at(self, indices: Tensor, linear: Tensor | None = None) -> Tensor:
        """``(N, k)`` values of chosen latents, with gradients."""
        return (self.u if self.value is None else self.value).gather(1, indices)


def _of_one_encoder(pres: Sequence[PreCodes | DensePreCodes]) -> bool:
    """Whether one set of weights codes the rows of all."""
    first = pres[0]
    return all(type(p) is PreCodes and p.weight is first.weight and p.bias is first.bias for p in pres)


def stacked(pres: Sequence[PreCodes | DensePreCodes]) -> PreCodes | None:
    """Pre-codes of the rows of several, below each other, where one set of weights codes them all; else None."""
    if not _of_one_encoder(pres):
        return None
    first, rows = pres[0], [pre.x for pre in pres]
    valid = None if first.valid is None else torch.cat([pre.valid for pre in pres])
    if any(pre.centre is not first.centre for pre in pres):  # of several, each has the gradients of its own rows
        x, centre = _Below.apply(len(pres), *rows, *[pre.centre for pre in pres]), None
    else:
        x, centre = torch.cat(rows), first.centre
    return replace(first, x=x, valid=valid, centre=centre, _dense=None, _offset=None)


def columns_below(pres: Sequence[PreCodes | DensePreCodes], ids: Tensor) -> Tensor | None:
    """``(M * N, len(ids))`` pre-codes of some latents, of N rows of each of M below each other, by one product.

    None where it takes several: the encoders differ, or the numbers of rows do.
    """
    if len(pres) == 1:
        return pres[0].columns(ids)
    if not _of_one_encoder(pres) or len({len(pre.x) for pre in pres}) > 1:
        return None
    first, biases = pres[0], [pre._biases() for pre in pres]
    linear = dense_columns(torch.cat([pre.x for pre in pres]), first.weight, ids, first.precision)
    if first.scale is not None:
        linear = linear * first.scale.index_select(0, ids)
    if all(bias is biases[0] for bias in biases):
        linear = linear if biases[0] is None else linear + biases[0].index_select(0, ids)
    else:
        own = torch.stack(biases).index_select(1, ids)[:, None]
        linear = (linear.unflatten(0, (len(pres), -1)) + own).flatten(0, 1)
    return first._activate(linear, None if first.valid is None else torch.cat([pre.valid for pre in pres]))


class _Below(torch.autograd.Function):
    """Rows below each other, from which centres of their own were taken: these have the gradients that rows have."""

    @staticmethod
    def forward(ctx, n: int, *given: Tensor | None) -> Tensor:
        ctx.counts = [len(rows) for rows in given[:n]]
        return torch.cat(given[:n])

    @staticmethod
    def backward(ctx, grad: Tensor):
        parts, needed = grad.split(ctx.counts), ctx.needs_input_grad[1:]
        rows = [part if need else None for part, need in zip(parts, needed, strict=False)]
        centres = [part.sum(0).neg_() if need else None for part, need in zip(parts, needed[len(parts) :], strict=True)]
        return None, *rows, *centres


def most(on: Tensor) -> int:
    """The most true entries that a row of a mask has, at least 1."""
    return max(1, int(on.sum(1).max())) if len(on) else 1


class PursuitCodes(PreCodes):
    """Codes that a pursuit has chosen by itself; as pre-codes they are those of what it left over, ``r @ atoms.T``.

    Args:
        residual: ``(N, d)`` what is left of each row.
        atoms: ``(d_sae, d)``.
        values: ``(N, T)`` chosen code values, with gradients.
        indices: ``(N, T)`` int64 ids, distinct within a row; an entry that was not used is 0.
        steps: ``(N,)`` steps done.
    """

    def __init__(self, residual: Tensor, atoms: Tensor, values: Tensor, indices: Tensor, steps: Tensor | None = None):
        super().__init__(residual, atoms, None)
        self.values, self.indices, self.steps = values, indices, steps
