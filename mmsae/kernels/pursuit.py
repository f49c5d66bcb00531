"""Greedy pursuits: codes of rows over unit atoms, one atom a step, chosen by what is left of the row.

Matching pursuit (MP) adds the correlation of the best atom to its coefficient. Orthogonal matching pursuit (OMP) fits
all chosen coefficients anew by least squares, gradient pursuit (GP, arXiv 2410.14670) moves them along their gradient.
What is chosen is found without gradients; :func:`mp_values` gives MP's coefficients gradients afterwards. A row stops
by itself, whatever the others of its batch do. Selection is in float32 at least: in bfloat16, 75 % of the rows have
another support after 32 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.kernels.ids import distinct
from mmsae.kernels.plain import linear, row_chunks

GRAM_BYTES = 2**30  # largest matrix of inner products of atoms that is made by itself
KEPT_BYTES = 2**28  # largest one that is kept for the next batch
BLOCK = 256  # atoms whose inner products are made together on a CPU
GRAM_ROWS = 128  # rows whose correlations stay in a CPU's cache while they are updated by inner products


class Stop(NamedTuple):
    """When a row stops; it always does where no atom has a correlation of the wanted sign."""

    steps: int  #: The most steps of a row.
    tol: float | None = None  #: After the step that brings the norm of its residual below this.
    repeat: bool = False  #: After a step that chose an atom which the row has already (MP).
    #: ``(N,)`` int64: once it has so many atoms (OMP, GP), or has done so many steps (MP).
    limit: Tensor | None = None


class Picks(NamedTuple):
    """What matching pursuit chose, step by step; an atom may be chosen again."""

    indices: Tensor  #: ``(N, T)`` int64 atoms.
    on: Tensor  #: ``(N, T)`` bool: whether the row did the step.


def best(correlation: Tensor, sign: str) -> tuple[Tensor, Tensor]:
    """``(N,)`` correlation of the best atom of each row, and its id.

    ``sign``: ``relu``, the largest, 0 where none is positive; ``abs``, the largest absolute value, sign kept; ``max``,
    the largest, whatever its sign. Of equal ones it is the first.
    """
    ranked = correlation.abs() if sign == "abs" else correlation
    # NumPy's is vectorised and seven times as fast as torch's; both take the first of equal ones
    if ranked.device.type == "cpu":
        j = torch.from_numpy(ranked.detach().numpy().argmax(1))
    else:
        j = ranked.argmax(1)
    value = correlation.gather(1, j[:, None])[:, 0]
    return (value.relu() if sign == "relu" else value), j


_kept: tuple[Tensor, Tensor] | None = None  # atoms, and their inner products


def inner_products(atoms: Tensor, keep: bool = False) -> Tensor:
    """``(F, F)`` inner products of atoms ``(F, d)``.

    With ``keep`` they are those of the last call where its atoms were the same to the bit (which is looked at, in a
    hundredth of the time), on a CPU and up to 256 MiB: an SAE that codes batch after batch has the same atoms.
    """
    global _kept
    keep = keep and atoms.device.type == "cpu" and 4 * len(atoms) ** 2 <= KEPT_BYTES
    if keep and _kept is not None and _kept[0].dtype == atoms.dtype and torch.equal(_kept[0], atoms):
        return _kept[1]
    inner = _mirrored(atoms) if atoms.device.type == "cpu" else atoms @ atoms.T
    if keep:
        _kept = atoms.clone(), inner
    return inner


def _mirrored(atoms: Tensor) -> Tensor:
    """The same, of each two equal products one; in blocks, whose transposes are read while they are in the cache."""
    f = len(atoms)
    inner = atoms.new_empty(f, f)
    for lo in range(0, f, BLOCK):
        hi = min(lo + BLOCK, f)
        inner[lo:hi, lo:] = made = linear(atoms[lo:hi], atoms[lo:], None)
        for at in range(hi, f, BLOCK):
            inner[at : at + BLOCK, lo:hi] = made[:, at - lo : at - lo + BLOCK].T
    return inner


def use_gram(n: int, n_atoms: int, steps: int, device: torch.device) -> bool:
    """Whether the atoms' inner products pay for MP of ``n`` rows.

    They cost as much as ``n_atoms / n`` steps, and half of that on a CPU.
    """
    cost = n_atoms / 2 if device.type == "cpu" else n_atoms
    return cost <= n * (steps - 1) and 4 * n_atoms**2 <= GRAM_BYTES


@torch.no_grad()
def mp_picks(x: Tensor, atoms: Tensor, stop: Stop, sign: str = "relu", gram: bool = False, keep: bool = False) -> Picks:
    """What matching pursuit chooses for rows ``x (N, d)`` among unit ``atoms (F, d)``.

    Args:
        x: ``(N, d)`` centred rows.
        atoms: ``(F, d)``, norm 1.
        stop: When a row stops.
        sign: Which correlations count; see :func:`best`.
        gram: Whether correlations are updated by the atoms' inner products (``F^2`` numbers, and 2F operations a row
            and step) instead of computed anew from the residual (2Fd). Both choose the same up to rounding.
        keep: Whether the inner products are kept for the next call (:func:`inner_products`).
    """
    atoms = atoms.contiguous()
    inner = inner_products(atoms, keep) if gram else None
    indices = torch.zeros(len(x), stop.steps, dtype=torch.long, device=x.device)
    on = torch.zeros_like(indices, dtype=torch.bool)
    chunks = row_chunks(len(x), len(atoms), x.device)
    if inner is not None and x.device.type == "cpu":
        chunks = (slice(at, at + GRAM_ROWS) for at in range(0, len(x), GRAM_ROWS))
    for rows in chunks:
        r = x[rows].clone()
        active = torch.ones(len(r), dtype=torch.bool, device=x.device)
        c = linear(r, atoms, None)
        taken = None if inner is None else torch.empty_like(c)  # a step's rows of the inner products
        for t in range(stop.steps):
            v, j = best(c, sign)
            active = active & (v != 0)
            if stop.limit is not None:
                active = active & (t < stop.limit[rows])
            v = v * active
            indices[rows, t], on[rows, t] = j, active
            if taken is None or stop.tol is not None:
                r.addcmul_(atoms[j], v[:, None], value=-1)
            if stop.repeat:
                active = active & ~((indices[rows, :t] == j[:, None]) & on[rows, :t]).any(1)
            if stop.tol is not None:
                active = active & (r.norm(dim=1) >= stop.tol)
            early = stop.repeat or stop.tol is not None or stop.limit is not None
            if t + 1 == stop.steps or (early and not active.any()):
                break
            if taken is None:
                c = linear(r, atoms, None)
            else:
                c.addcmul_(torch.index_select(inner, 0, j, out=taken), v[:, None], value=-1)
    return Picks(indices, on)


class _Chain(torch.autograd.Function):
    """``v_t = on_t <r_{t-1}, d_t>``, ``r_t = r_{t-1} - v_t d_t``; residuals are computed back, not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, atoms: Tensor, indices: Tensor, on: Tensor) -> tuple[Tensor, Tensor]:
        r, values = x.clone(), x.new_zeros(indices.shape)
        for t in range(indices.shape[1]):
            d = atoms[indices[:, t]]
            values[:, t] = (r * d).sum(1) * on[:, t]
            r.addcmul_(d, values[:, t : t + 1], value=-1)
        ctx.save_for_backward(atoms, indices, on, values, r)
        return values, r

    @staticmethod
    def backward(ctx, grad_values: Tensor, grad_r: Tensor) -> tuple[Tensor, Tensor, None, None]:
        atoms, indices, on, values, r = ctx.saved_tensors
        r, g, grad_atoms = r.clone(), grad_r.clone(), torch.zeros_like(atoms)
        for t in reversed(range(indices.shape[1])):
            d, v = atoms[indices[:, t]], values[:, t : t + 1]
            r.addcmul_(d, v)  # r_{t-1}
            gv = ((grad_values[:, t] - (g * d).sum(1)) * on[:, t])[:, None]
            grad_atoms.index_add_(0, indices[:, t], gv * r - v * g)
            g.addcmul_(d, gv)
        return g, grad_atoms, None, None


def mp_values(x: Tensor, atoms: Tensor, picks: Picks) -> tuple[Tensor, Tensor]:
    """``(N, T)`` values of MP's picks and ``(N, d)`` residuals, with gradients through values and residuals.

    Memory for the backward pass is ``O(N (d + T))``: a step can be undone.
    """
    return _Chain.apply(x, atoms, *picks)


def merge(values: Tensor, picks: Picks, n_atoms: int) -> tuple[Tensor, Tensor]:
    """``(N, min(T, F))`` values and ids of picks ``values (N, T)``, where repeated atoms are one entry of their sum.

    Ids are distinct within a row: entries that are not used are 0 and have ids that the row has not.
    """
    width = min(picks.indices.shape[1], n_atoms)
    ids, order = torch.where(picks.on, picks.indices, n_atoms).sort(dim=1, stable=True)
    new = torch.ones_like(ids)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    group = new.cumsum(1) - 1  # the last may be that of steps not done
    slot = torch.zeros_like(group).scatter_(1, order, group)
    summed = values.new_zeros(len(values), width + 1).scatter_add(1, slot, values)[:, :width]
    found = torch.full_like(ids[:, :1], n_atoms).expand(-1, width + 1).scatter(1, group, ids)[:, :width]
    return summed, distinct(found, found < n_atoms)


class FittedPursuit(NamedTuple):
    """Codes whose coefficients were fitted together."""

    values: Tensor  #: ``(N, K)``.
    indices: Tensor  #: ``(N, K)`` int64, distinct within a row.
    residual: Tensor  #: ``(N, d)``.
    steps: Tensor  #: ``(N,)`` int64 steps done.


# from the support's inner products (n, K, K), correlations with the row (n, K), coefficients and mask (n, K): new ones
Fit = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]


def _solve(inner: Tensor, target: Tensor, on: Tensor) -> Tensor:
    """``(n, K)`` least-squares coefficients on a mask."""
    both = on[:, :, None] & on[:, None, :]
    eye = torch.eye(inner.shape[1], dtype=inner.dtype, device=inner.device)
    # the ridge is far below float32 and lets an atom that the others span come without a fault
    system = torch.where(both, inner, 0.0) + eye * torch.where(on, 1e-10, 1.0)[:, None]
    factor = torch.linalg.cholesky_ex(system).L
    return torch.cholesky_solve(torch.where(on, target, 0.0)[:, :, None], factor)[:, :, 0]


def _least_squares(inner: Tensor, target: Tensor, w: Tensor, on: Tensor, positive: bool) -> Tensor:
    """OMP's: least squares; ``positive``: non-negative ones by the inner loop of Lawson and Hanson.

    An atom whose coefficient falls to 0 leaves the support, and may be chosen again.
    """
    solved = _solve(inner, target, on)
    while positive:
        bad = on & (solved <= 0)
        if not bad.any():
            break
        # as far towards the solution as all stay non-negative; there at least one is 0 and leaves
        ratio = torch.where(bad, w / (w - solved).clamp(min=1e-30), torch.inf)
        share = ratio.min(1, keepdim=True).values
        w = torch.where(on, w + share.clamp(max=1.0) * (solved - w), 0.0)
        on = on & ~(bad & (ratio <= share))
        w = torch.where(on, w.clamp(min=0), 0.0)
        solved = _solve(inner, target, on)
    return torch.where(on, solved, 0.0)


def _along_gradient(inner: Tensor, target: Tensor, w: Tensor, on: Tensor, positive: bool) -> Tensor:
    """GP's: one step of the best length along the gradient on the support, clipped at 0 with ``positive``."""
    g = torch.where(on, target - (inner @ w[:, :, None])[:, :, 0], 0.0)
    length = (g * (inner @ g[:, :, None])[:, :, 0]).sum(1, keepdim=True)
    w = w + g * g.square().sum(1, keepdim=True) / length.clamp(min=1e-30)
    return w.clamp(min=0) if positive else w


_FITS: dict[str, Fit] = {"omp": _least_squares, "gp": _along_gradient}


@torch.no_grad()
def fitted_pursuit(x: Tensor, atoms: Tensor, stop: Stop, sign: str = "relu", kind: str = "omp") -> FittedPursuit:
    """Orthogonal matching pursuit (``omp``) or gradient pursuit (``gp``); no gradients, small systems in float64.

    An atom enters the support with each step; with ``sign="relu"`` coefficients are non-negative, and atoms of
    coefficient 0 leave. A row also stops where what is left of it has no correlation above rounding.
    Shapes are those of :func:`mp_picks`.
    """
    width, done = min(stop.steps, len(atoms)), []
    if stop.limit is not None and len(x):  # a row never holds more atoms
        width = min(width, max(1, int(stop.limit.max())))
    for rows in row_chunks(len(x), len(atoms), x.device):
        limit = None if stop.limit is None else stop.limit[rows]
        done.append(_fit_rows(x[rows], atoms, stop._replace(limit=limit), sign, _FITS[kind], width))
    if not done:
        ids = torch.zeros(0, width, dtype=torch.long, device=x.device)
        return FittedPursuit(x.new_zeros(0, width), ids, x.clone(), ids[:, 0])
    return FittedPursuit(*map(torch.cat, zip(*done, strict=True)))


def _fit_rows(x: Tensor, atoms: Tensor, stop: Stop, sign: str, fit: Fit, width: int) -> FittedPursuit:
    n = len(x)
    ids = torch.zeros(n, width, dtype=torch.long, device=x.device)
    w = torch.zeros(n, width, dtype=torch.float64, device=x.device)
    steps, r = torch.zeros(n, dtype=torch.long, device=x.device), x
    floor = 1e-6 * x.norm(dim=1)
    active = torch.ones(n, dtype=torch.bool, device=x.device)
    for t in range(stop.steps):
        k = min(t + 1, width)
        if stop.limit is not None:
            active = active & ((w != 0).sum(1) < stop.limit)
        v, j = best(linear(r, atoms, None), sign)
        active = active & (v.abs() > floor)
        if not active.any():
            break
        on = w[:, :k] != 0
        has = (ids[:, :k] == j[:, None]) & on
        free = on.long().argmin(1)  # the first entry that is not used
        slot = torch.where(has.any(1), has.long().argmax(1), free)[:, None]
        ids[:, :k] = torch.where(active[:, None], ids[:, :k].scatter(1, slot, j[:, None]), ids[:, :k])
        on = on.scatter(1, slot, True)
        support = atoms[ids[:, :k]].double()
        target = (support @ x.double()[:, :, None])[:, :, 0]
        new = fit(support @ support.mT, target, w[:, :k], on, sign == "relu")
        w[:, :k] = torch.where(active[:, None], new, w[:, :k])
        r = x - (w[:, None, :k].to(x.dtype) @ support.to(x.dtype))[:, 0]
        steps += active
        if stop.tol is not None:
            active = active & (r.norm(dim=1) >= stop.tol)
    return FittedPursuit(w.to(x.dtype), distinct(ids, w != 0), r, steps)
