"""Products of two sparse codes row by row, without ever building the ``(N, d_sae)`` matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmsae.kernels.choice import backend_for
from mmsae.types import Codes


def paired_read(idx_a: Tensor, values_b: Tensor, idx_b: Tensor) -> Tensor:
    """``(N, ka)`` values of sparse rows ``b`` at the ids of ``a`` (0 where ``b`` did not select them); differentiable.

    Costs a sort and a binary search per row, O(k log k) time and O(N k) memory, whatever ``d_sae`` is. Arguments as in
    :func:`paired_dot`.
    """
    if not idx_b.shape[1]:
        return values_b.new_zeros(idx_a.shape)
    idx_b, order = idx_b.sort(1)
    slot = torch.searchsorted(idx_b, idx_a.contiguous()).clamp_(max=idx_b.shape[1] - 1)
    return values_b.gather(1, order).gather(1, slot) * (idx_b.gather(1, slot) == idx_a)


def paired_product(values_a: Tensor, idx_a: Tensor, values_b: Tensor, idx_b: Tensor) -> Tensor:
    """``(N, ka)`` elementwise product of two sparse rows, read at the ids of ``a``; see :func:`paired_read`."""
    return values_a * paired_read(idx_a, values_b, idx_b)


def paired_dot(
    values_a: Tensor, idx_a: Tensor, values_b: Tensor, idx_b: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Inner product of row i of ``a`` with row i of ``b``, both sparse; differentiable (twice) in values and weights.

    Args:
        values_a: ``(N, ka)`` values.
        idx_a: ``(N, ka)`` int64 latent ids, distinct within a row.
        values_b: ``(N, kb)`` values.
        idx_b: ``(N, kb)`` int64 latent ids, distinct within a row.
        weights: ``(d_sae,)`` weight of each latent in the product, or None for 1.

    Returns:
        ``(N,)`` sum over latents of ``weights * a * b``.
    """
    prod = paired_product(values_a, idx_a, values_b, idx_b)
    return (prod if weights is None else prod * weights[idx_a]).sum(1)


def code_dot(a: Codes, b: Codes, weights: Tensor | None = None) -> Tensor:
    """``(N,)`` inner products of paired rows of two codes, sparse or dense, by the cheapest route."""
    if a.indices is not None and b.indices is not None:
        return paired_dot(a.values, a.indices, b.values, b.indices, weights)
    if a.indices is None and b.indices is not None:
        a, b = b, a
    # one sparse, one dense: read the dense rows at the sparse ids
    prod = a.values * (b.values if a.indices is None else b.values.gather(1, a.indices))
    if weights is not None:
        prod = prod * (weights if a.indices is None else weights[a.indices])
    return prod.sum(1)


def code_norm(codes: Codes, weights: Tensor | None = None) -> Tensor:
    """``(N,)`` Euclidean norms, under the inner product with ``weights (d_sae,)`` if given.

    The gradient at a zero row is 0 rather than infinite.
    """
    if weights is None:
        return torch.linalg.vector_norm(codes.values, dim=1)  # whose gradient at 0 is 0
    sq = codes.values.square() * (weights if codes.indices is None else weights[codes.indices])
    total = sq.sum(1)
    return torch.where(total > 0, total, 1).sqrt() * (total > 0)


def unit_codes(codes: Codes) -> Codes:
    """The same codes with rows of norm 1 (zero rows stay zero); differentiable."""
    return codes._replace(values=codes.values / code_norm(codes).clamp(min=1e-12)[:, None])


def mask_tops(a: Codes, b: Codes, n: int = 1) -> tuple[Codes, Codes]:
    """Zero, in both rows of every pair, the latents that are among the ``n`` largest (absolute) of either row.

    The top latents of uncentred embeddings carry the modality; without the mask one latent that is always on makes any
    two codes look alike (Aligned SAE, arXiv 2602.06218).
    """
    tops = []
    for c in (a, b):
        at = c.values.abs().topk(min(n, c.values.shape[1]), dim=1).indices
        tops.append(at if c.indices is None else c.indices.gather(1, at))
    tops = torch.cat(tops, 1)
    out = []
    for c in (a, b):
        if c.indices is None:
            out.append(c._replace(values=c.values.scatter(1, tops, 0.0)))
        else:
            hit = (c.indices[:, :, None] == tops[:, None, :]).any(2)
            out.append(c._replace(values=c.values.masked_fill(hit, 0.0)))
    return out[0], out[1]


def code_cosine(a: Codes, b: Codes, weights: Tensor | None = None, mask_top: int = 0, eps: float = 1e-12) -> Tensor:
    """Cosine between paired rows of two codes, differentiable in the values.

    Args:
        a: Codes of N rows.
        b: Codes of the N partners, same ``d_sae``.
        weights: ``(d_sae,)`` non-negative weights: numerator and norms are taken under
            ``<a, b>_w = sum_j w_j a_j b_j``.
        mask_top: Ignore, in both rows, the latents that are among the ``mask_top`` largest of either row.
        eps: Lower bound of the product of norms.

    Returns:
        ``(N,)``; 0 where either code is zero.
    """
    if mask_top:
        a, b = mask_tops(a, b, mask_top)
    if weights is None and _has_kernel(a, b):
        return _Cosine.apply(a.values, a.indices, b.values, b.indices, eps)
    return code_dot(a, b, weights) / (code_norm(a, weights) * code_norm(b, weights)).clamp(min=eps)


def _has_kernel(a: Codes, b: Codes) -> bool:
    """Whether one kernel compares two codes."""
    if a.indices is None or b.indices is None or backend_for(a.values).name != "triton":
        return False
    from mmsae.kernels.triton.pairs import MOST

    widths = a.values.shape[1], b.values.shape[1]
    return a.values.dtype == b.values.dtype == torch.float32 and 0 < min(widths) and max(widths) <= MOST


class _Cosine(torch.autograd.Function):
    """:func:`code_cosine` of sparse codes, one kernel each way."""

    @staticmethod
    def forward(ctx, values_a: Tensor, idx_a: Tensor, values_b: Tensor, idx_b: Tensor, eps: float) -> Tensor:
        from mmsae.kernels.triton.pairs import cosine

        given = [t.contiguous() for t in (values_a, idx_a, values_b, idx_b)]
        out = cosine(*given, eps)
        ctx.eps = eps
        ctx.save_for_backward(*given, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from mmsae.kernels.triton.pairs import cosine_gradients

        grad_a, grad_b = cosine_gradients(*ctx.saved_tensors, grad, ctx.eps)
        return grad_a, None, grad_b, None, None
