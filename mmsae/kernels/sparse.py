"""Sparse products and selections by the backend of the tensors' device; see :mod:`mmsae.kernels.backend`.

The encoder's product is never kept as a whole: what is asked of it is ranked, and the rest forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.kernels import grouped
from mmsae.kernels.backend import Backend, Ranking, Score
from mmsae.kernels.choice import backend_for
from mmsae.kernels.grouped import Largest
from mmsae.kernels.ids import distinct
from mmsae.kernels.plain import scaled
from mmsae.kernels.precision import effective
from mmsae.kernels.screen import Screen, screen_pays


def sparse_decode(values: Tensor, indices: Tensor, atoms: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(N, d)`` sums of ``atoms (F, d)`` rows weighted by ``values (N, k)`` at ``indices (N, k)``; differentiable.

    ``bias (d,)`` is added to every sum.
    """
    return backend_for(atoms).decode(values, indices, atoms, bias)


def decode_largest(pre: Tensor, k: int, atoms: Tensor, signed: bool = False) -> Tensor:
    """``(N, d)`` sums of ``atoms (F, d)`` weighted by the positive ones of the k largest ``pre (N, F)`` of a row.

    With ``signed`` they are those of largest absolute value, whatever their sign. Differentiable.
    """
    return decode_largest_each(pre, k, [atoms], signed)[0]


def decode_largest_each(pre: Tensor, k: int, tables: Sequence[Tensor], signed: bool = False) -> list[Tensor]:
    """:func:`decode_largest` of rows ``pre (M * N, F)``, of which N are decoded with each of M ``tables (F, d)``."""
    backend, first = backend_for(tables[0]), tables[0]
    if not backend.dense_pays(first.device, len(first), k):
        ranked = pre.detach()
        indices = backend.topk(ranked, k, Ranking(absolute=True) if signed else None)[1]
        values = (pre if signed else pre.relu()).gather(1, indices)
        parts = zip(_parts(values, tables), _parts(indices, tables), tables, strict=True)
        return [backend.decode(part, ids, atoms) for part, ids, atoms in parts]
    codes = _parts(_Largest.apply(backend, pre, k, signed).to(first.dtype), tables)
    if backend.fused:
        return [part @ atoms for part, atoms in zip(codes, tables, strict=True)]
    if more := -len(first) % backend.whole:
        codes, tables = [F.pad(part, (0, more)) for part in codes], [F.pad(t, (0, 0, 0, more)) for t in tables]
    return [backend.dense_product(part, atoms.t()) for part, atoms in zip(codes, tables, strict=True)]


def _parts(rows: Tensor, tables: Sequence[Tensor]) -> Sequence[Tensor]:
    return [rows] if len(tables) == 1 else rows.chunk(len(tables))


class _Largest(torch.autograd.Function):
    """``(N, F)`` the k largest of each row, the positive ones of them where they have no signs, and 0 elsewhere."""

    @staticmethod
    def forward(ctx, backend: Backend, pre: Tensor, k: int, signed: bool) -> Tensor:
        marks = backend.marked(pre.abs() if signed else pre, k)
        codes = pre * marks if signed else marks.mul_(pre.relu())
        ctx.signed = signed
        ctx.save_for_backward(marks if signed else codes)
        return codes

    @staticmethod
    def backward(ctx, grad: Tensor):
        (on,) = ctx.saved_tensors
        grad = grad * on if ctx.signed else torch.ops.aten.threshold_backward.default(grad, on, 0)
        return None, grad, None, None


def sparse_scatter(values: Tensor, indices: Tensor, x: Tensor, n_rows: int) -> Tensor:
    """``(n_rows, d)`` for each latent the sum of ``x (N, d)`` weighted by its values; differentiable.

    That is ``codes.T @ x`` of codes ``values (N, k)`` at ``indices (N, k)``.
    """
    return backend_for(x).sums(values, indices, x, n_rows)


def sampled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    values: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """``(N, k)`` entries ``indices`` of ``(x @ weight.T) * scale + bias``, with gradients for these entries only.

    Args:
        x: ``(N, d)`` inputs.
        weight: ``(F, d)``.
        bias: ``(F,)`` or None.
        indices: ``(N, k)`` columns wanted of each row.
        values: The entries themselves where they are known already (from the product that chose them).
        scale: ``(F,)`` factor of each column, not 0, or None.
    """
    return backend_for(x).entries(x, weight, bias, indices, values, scale)


def dense_linear(x: Tensor, weight: Tensor, precision: str | None = None) -> Tensor:
    """``(N, F)`` ``x @ weight.T``, its operands in a precision (see :class:`mmsae.SAE`); differentiable."""
    return backend_for(x).dense_product(x, weight, effective(precision, x))


def dense_columns(x: Tensor, weight: Tensor, ids: Tensor, precision: str | None = None) -> Tensor:
    """``(N, len(ids))`` ``x @ weight[ids].T``, as :func:`dense_linear`."""
    # the gradient of index_select takes a fraction of that of weight[ids]
    if not (more := -len(ids) % backend_for(x).whole):
        return dense_linear(x, weight.index_select(0, ids), precision)
    return dense_linear(x, weight.index_select(0, F.pad(ids, (0, more))), precision)[:, : len(ids)]


@torch.no_grad()
def raw_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, precision: str | None = None
) -> Tensor:
    """``(N, F)`` ``(x @ weight.T) * scale + bias`` without gradients, in bfloat16 where that is its precision."""
    backend, precision = backend_for(x), effective(precision, x)
    product = backend.product(x, weight, bias if scale is None else None, precision)
    return product if scale is None else scaled(product.to(x.dtype), scale, bias)


def _products(
    backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, precision: str
) -> Iterator[tuple[slice, Tensor]]:
    """``(rows, their part of (x @ weight.T) * scale + bias)``, so many rows at a time as are fast on the device."""
    weight = weight.bfloat16() if precision == "bf16" else weight  # once, and not for every part
    for rows in backend.chunks(len(x), len(weight), x.device):
        part = x if rows.stop - rows.start == len(x) else x[rows]
        product = backend.product(part, weight, bias if scale is None else None, precision)
        yield rows, product if scale is None else scaled(product.to(x.dtype), scale, bias)


@torch.no_grad()
def chunked_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    score: Score | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of ``(x @ weight.T) * scale + bias``, without keeping the (N, F) product.

    Shapes are those of :func:`sampled_linear`. ``score(product, rows)`` is what is ranked, as a function of the product
    of some rows (default: itself). What is chosen are the largest of a product of ``precision``.

    Returns:
        ``(values, indices)``, both ``(N, k)``; values are entries of the float32 product, not scores.
    """
    backend, precision = backend_for(x), effective(precision, x)
    if precision == "fp32" and screen_pays(backend, x, weight, k, score):
        return _screened_topk(backend, Screen(x, weight, bias, scale, score), k)
    return _chunked_topk(backend, x, weight, bias, k, score, scale, precision)


def _chunked_topk(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    score: Score | None,
    scale: Tensor | None,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    seen = score is None or isinstance(score, Ranking)
    later = scale if backend.fused and seen and bias is None else None  # columns are scaled while they are ranked
    values, indices = [], []
    for rows, product in _products(backend, x, weight, bias, None if later is not None else scale, precision):
        if seen:
            ranking = score if later is None else (score or Ranking()).times(later)
            val, idx = backend.topk(product, k, ranking)
        else:
            idx = backend.topk(score(product.to(x.dtype), rows), k)[1]
            val = product.gather(1, idx)
        values.append(val if later is None else val * later[idx])
        indices.append(idx)
    if not values:
        return x.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=x.device)
    indices = _below(indices)
    if precision == "fp32":
        return _below(values), indices
    return backend.entries(x, weight, bias, indices, None, scale), indices


def _screened_topk(backend: Backend, screen: Screen, k: int) -> tuple[Tensor, Tensor]:
    """:func:`chunked_topk` behind a screen; rows that it says too little of are chosen from without."""
    values, indices, odd = screen.topk(k)
    if len(odd):
        padded = odd[torch.arange(-(-len(odd) // backend.whole) * backend.whole) % len(odd)]  # shapes that are known
        found = _chunked_topk(backend, screen.x[padded], screen.weight, screen.bias, k, screen.ranking, screen.scale)
        values[odd], indices[odd] = (t[: len(odd)] for t in found)
    return values, indices


def _below(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def chunked_above(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    score: Score | None = None,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of ``(x @ weight.T) * scale + bias`` whose score is above a threshold, without the (N, F) product.

    ``threshold`` is one number or ``(F,)``; the score of a product of ``precision`` is compared with it. Rows with
    fewer entries than the fullest one are filled with other ids, which do not count.

    Returns:
        ``(values, indices, kept)``, all ``(N, k)`` with k the most entries of a row, at least 1; values are entries of
        the float32 product.
    """
    backend, precision = backend_for(x), effective(precision, x)
    if precision == "fp32" and screen_pays(backend, x, weight, 1, score):
        found = Screen(x, weight, bias, scale, score).above(threshold)
        if found is not None:
            return found
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    k = 1
    for rows, product in _products(backend, x, weight, bias, scale, precision):
        product = product.to(x.dtype)  # a threshold between two bfloat16 numbers is not rounded to one of them
        idx, on = backend.above(product if score is None else score(product, rows), threshold, k)
        k = idx.shape[1]
        parts.append((product.gather(1, idx), idx, on))
    if not parts:
        empty = torch.zeros(0, 1, dtype=torch.long, device=x.device)
        return x.new_zeros(0, 1), empty, empty.bool()
    values, indices, kept = _widened(parts, k)
    return values if precision == "fp32" else backend.entries(x, weight, bias, indices, None, scale), indices, kept


@torch.no_grad()
def chunked_largest(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    budget: int,
    score: Score,
    scale: Tensor | None = None,
    precision: str | None = None,
) -> Largest:
    """The ``budget`` largest positive scores of a batch's ``(x @ weight.T) * scale + bias``, without the whole product.

    For rows on the CPU and the backend ``torch``; arguments are those of :func:`chunked_above`.
    """
    backend, precision = backend_for(x), effective(precision, x)

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, product in _products(backend, x, weight, bias, scale, precision):
            product = product.to(x.dtype)
            yield product, score(product, rows)

    def reaching(slack: float) -> grouped.Found:
        found = None if screen is None else screen.reaching(budget, slack)
        return grouped.reaching(parts(), len(x), budget, slack) if found is None else found

    screens = precision == "fp32" and screen_pays(backend, x, weight, budget / len(x), score)
    screen = Screen(x, weight, bias, scale, score) if screens else None
    found = grouped.largest(reaching, len(x), len(weight), budget)
    found = found._replace(values=found.values.to(x.dtype))
    if precision == "fp32":
        return found
    return found._replace(values=backend.entries(x, weight, bias, found.indices, None, scale))


def _widened(parts: list[tuple[Tensor, Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Below each other, the narrower ones filled up with ids that their rows have not."""
    values, indices, kept = [], [], []
    for val, idx, on in parts:
        if missing := k - idx.shape[1]:
            had = F.pad(torch.ones_like(on), (0, missing))
            val, idx, on = (F.pad(t, (0, missing)) for t in (val, idx, on))
            idx = distinct(idx, had)
        values.append(val)
        indices.append(idx)
        kept.append(on)
    return torch.cat(values), torch.cat(indices), torch.cat(kept)
