"""Which features to steer, by contrast and by attribution.

Both only propose. Features that fire on a concept and features that cause it are mostly different sets: filtering by
what a feature puts out made steering 2-3 times better (arXiv 2505.20063), ranking by the effect of amplification better
still (2510.03659). So steer the candidates, at equal size of change, and let a scorer that had no part in it decide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.hosts.base import Host
from mmsae.hosts.sites import Where
from mmsae.kernels import sampled_linear
from mmsae.sae import SAE
from mmsae.steering.edits.attach import check_site
from mmsae.steering.edits.codes import row_scale
from mmsae.types import Codes, InputError, Site


class Ranking(NamedTuple):
    """Features, best first."""

    ids: Tensor  #: ``(n,)``.
    score: Tensor  #: ``(n,)`` by which they were ranked.
    holdout: Tensor | None = None  #: ``(n,)`` the same score on rows that did not choose; None where there are none.

    def top(self, n: int) -> Ranking:
        """The best n."""
        return Ranking(*(t if t is None else t[:n] for t in self))


def _level(codes: Codes, by: str) -> Tensor:
    """``(d_sae,)`` mean code, or firing rate, of each feature."""
    values = codes.values.double() if by == "mean" else (codes.values != 0).double()
    total = codes._replace(values=values).pool(torch.zeros(codes.n, dtype=torch.long, device=values.device), 1)
    return total[0]


def contrast(
    target: Codes, background: Codes, n: int = 10, by: str = "mean", holdout: float = 0.5, seed: int = 0
) -> Ranking:
    """Features that fire more on the target rows than on the background.

    The guard: scores are computed twice, on disjoint rows; features whose difference has another sign on the rows that
    did not choose them are left out.

    Args:
        target: Codes of rows with the concept; e.g. one pooled row per sample, so that halves are halves of samples.
        background: Codes of rows without it.
        n: Largest number of features.
        by: ``mean`` (difference of means over all rows; of codes with signs, features whose code rises) or ``rate``
            (of firing rates; SAVE, arXiv 2512.07730).
        holdout: Share of the rows that only check; 0 checks nothing.
        seed: Seed of the split; rows are drawn, not cut off.

    Raises:
        InputError: Another ``by``, or too few rows to split.
    """
    if by not in ("mean", "rate"):
        raise InputError(f"contrast by {by!r} is not one of mean, rate")
    g = torch.Generator().manual_seed(seed)
    parts: list[list[Codes]] = [[], []]
    for name, codes in (("target", target), ("background", background)):
        held = round(holdout * codes.n)
        if held == codes.n or (holdout and not held):
            raise InputError(f"contrast: the {name} set has {codes.n} rows, of which {held} would be held out")
        order = torch.randperm(codes.n, generator=g).to(codes.values.device)
        parts[0].append(codes.rows(order[held:]))
        parts[1].append(codes.rows(order[:held]))
    score = _level(parts[0][0], by) - _level(parts[0][1], by)
    check = _level(parts[1][0], by) - _level(parts[1][1], by) if holdout else None
    good = score > 0 if check is None else (score > 0) & (check > 0)
    ids = score.masked_fill(~good, -torch.inf).argsort(descending=True, stable=True)[: min(n, int(good.sum()))]
    return Ranking(ids, score[ids], None if check is None else check[ids])


def attribution(sae: SAE, codes: Codes, grad: Tensor, item: Tensor | None = None) -> Tensor:
    """``a_i = sum_t z_ti <d_i, grad_x_t L>``: first-order effect of every feature on L, from one backward pass.

    It is the loss that goes if feature i is ablated, exactly where the host is linear after x (first-order patching).

    Args:
        sae: The SAE.
        codes: ``z`` of N rows.
        grad: ``(N, d)`` gradients of L at these rows; see :func:`gradient`.
        item: ``(N,)`` sample of each row; then ``(items, d_sae)`` are returned, else ``(d_sae,)`` summed over all rows.
    """
    m = sae._modality(codes.modality)
    grad = grad.float() * row_scale(sae, m, codes.info)
    if codes.indices is None:
        each = codes.values * (grad @ sae.dictionary(m).rows().float().t())
    else:
        each = codes.values * sampled_linear(grad, sae.dictionary(m).rows().float(), None, codes.indices)
    groups = torch.zeros(codes.n, dtype=torch.long, device=grad.device) if item is None else item
    n = int(groups.max()) + 1 if codes.n else 1
    counts = torch.bincount(groups, minlength=n).clamp(min=1).to(each)
    total = codes._replace(values=each).pool(groups, n) * counts[:, None]  # pool gives means
    return total[0].detach() if item is None else total.detach()


def gradient(
    host: Host, site: Site | str, run: Callable[[], Any], loss: Callable[[Any], Tensor]
) -> tuple[Tensor, Tensor, Where]:
    """Rows ``x (N, d)`` of a site, the gradient of a loss there and what the rows are, by one pass and its backward.

    ``run`` calls ``host.model`` (not ``encode_*``, ``forward`` or ``generate`` of the host, which keep no graph);
    ``loss`` is of what it returned, e.g. ``logit(answer) - logit(baseline)``. Parameters stay frozen.

    Raises:
        InputError: ``run`` does not compute the site, or computes it several times.
    """
    seen: list[tuple[Tensor, Where]] = []

    def leaf(rows: Tensor, where: Where) -> Tensor:
        if not torch.is_grad_enabled():
            raise InputError(f"site {site}: the host runs without gradients; call host.model itself")
        seen.append((rows.detach().requires_grad_(), where))
        return seen[-1][0] * 1.0

    with torch.enable_grad(), host.edit(site, leaf, where=True):
        value = loss(run())
    if len(seen) != 1:
        raise InputError(f"site {site} was computed {len(seen)} times; a gradient needs one pass")
    x, where = seen[0]
    (grad,) = torch.autograd.grad(value, x)
    return x.detach(), grad, where


def attribute(
    host: Host,
    site: Site | str,
    sae: SAE,
    run: Callable[[], Any],
    loss: Callable[[Any], Tensor],
    n: int = 10,
    allow_other_site: bool = False,
) -> Ranking:
    """Features by the size of their :func:`attribution` to a loss; the score keeps its sign."""
    at, modality = check_site(host, site, sae, allow_other_site)
    x, grad, _ = gradient(host, at, run, loss)
    with torch.no_grad():
        a = attribution(sae, sae.encode(x, modality), grad)
    ids = a.abs().argsort(descending=True, stable=True)[:n]
    return Ranking(ids, a[ids])
