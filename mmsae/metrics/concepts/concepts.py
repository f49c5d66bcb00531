"""Which latent is which known concept, chosen on training samples and scored on held-out ones.

For every concept and for image, text and ``same`` (one latent for both modalities, the lower of the two scores) the
best latent and threshold are chosen on one set of samples; F1 and AUC are then measured on another. Choosing is
vectorised over latents: one sort and a few products per chunk of latents; of top-k codes only what is not 0 is sorted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mmsae.metrics.concepts.evidence import run_starts
from mmsae.metrics.concepts.ranked import Ranked, ranked
from mmsae.metrics.statistics import auroc_columns, auroc_table
from mmsae.types import Codes, InputError

QUANTILES = (0.25, 0.5, 0.75)
SAME = "same"


def thresholds(z: Tensor) -> Tensor:
    """``(1 + 3, L)`` candidate thresholds per column of ``z (N, L)``: 0 and the quartiles of its positive values."""
    v = z.T.contiguous().sort(1).values
    n, pos = len(z), (z > 0).sum(0)
    out = [torch.zeros_like(v[:, 0])]
    for q in QUANTILES:
        at = (n - pos) + q * (pos - 1).clamp(min=0).double()
        lo = at.floor().long().clamp(max=n - 1)
        hi = (lo + 1).clamp(max=n - 1)
        a, b = v.gather(1, lo[:, None])[:, 0], v.gather(1, hi[:, None])[:, 0]
        out.append(torch.where(pos > 0, torch.lerp(a, b, (at - lo).to(v)), 0.0))
    return torch.stack(out)


def f1_table(z: Tensor, truth: Tensor, at: Tensor) -> Tensor:
    """``(T, C, L)`` F1 of "latent l of ``z (N, L)`` is above threshold t of ``at (T, L)``" as detector of concept c."""
    t = truth.T.to(torch.float32)  # counts stay exact in float32 up to 16.7 M samples
    n_true = t.sum(1)[:, None]
    out = []
    for thr in at:
        fired = (z > thr).to(torch.float32)
        out.append(2 * (t @ fired) / (fired.sum(0)[None] + n_true).clamp(min=1))
    return torch.stack(out)


class Match(NamedTuple):
    """The latents chosen for C concepts."""

    f1_latent: dict[str, Tensor]  #: ``{side: (C,)}`` latent chosen by F1, for the sides image, text and same
    #: ``{side: {modality: (C,)}}`` its threshold; ``same`` has one per modality
    threshold: dict[str, dict[str, Tensor]]
    auc_latent: dict[str, Tensor]  #: ``{side: (C,)}`` latent chosen by AUC


def _sparse_thresholds(r: Ranked, pos: Tensor) -> Tensor:
    """:func:`thresholds` of latents of which ``pos (L,)`` entries are positive, the first of each."""
    value = torch.cat([r.value, r.value.new_zeros(1)])  # the last may have none
    out = [value.new_zeros(len(pos))]
    for q in QUANTILES:
        at = q * (pos - 1).clamp(min=0).double()
        lo = at.floor().long()  # counted from the smallest
        a, b = (value[r.start[:-1] + (pos - 1 - i).clamp(min=0)] for i in (lo, lo + 1))
        out.append(torch.where(pos > 0, torch.lerp(a, b, (at - lo).to(value)), 0.0))
    return torch.stack(out)


def _sparse_f1(r: Ranked, truth: Tensor, at: Tensor) -> Tensor:
    """:func:`f1_table` of thresholds ``at (T, L)`` that rise from 0: what is above one is above those before it."""
    above = torch.stack([torch.bincount(r.latent[r.value > t[r.latent]], minlength=len(t)) for t in at])
    ends = torch.cat([torch.zeros_like(above[:1]), above.flip(0)])  # of each latent's entries, from the largest down
    t = truth.to(torch.float32)  # counts stay exact in float32 up to 16.7 M samples
    parts = embedding_bag(r.row, t, (r.start[:-1] + ends).T.flatten(), mode="sum").view(-1, len(ends), t.shape[1])
    hits = parts[:, :-1].cumsum(1).flip(1).permute(1, 2, 0)
    return 2 * hits / (above[:, None] + t.sum(0)[:, None]).clamp(min=1)


def _sparse_auroc(r: Ranked, truth: Tensor, pos: Tensor) -> Tensor:
    """:func:`auroc_table` from the ranks of the entries and the rank that all zeros of a latent share."""
    t, n, count = truth.double(), len(truth), r.start.diff()
    i, none = torch.arange(len(r.row), device=r.row.device), (n - count).double()
    first = torch.where(run_starts(r.latent, r.value), i, 0).cummax(0).values if len(i) else i
    size = torch.bincount(first, minlength=len(i))[first].double()  # of the run of equal values
    rank = r.start[1:][r.latent] - first - (size - 1) / 2  # among the latent's own entries, the smallest is 1
    rank += none[r.latent] * (r.value > 0)
    zero = count - pos + (none + 1) / 2
    total = embedding_bag(r.row, t, r.start[:-1], mode="sum", per_sample_weights=rank - zero[r.latent]).T
    true = t.sum(0)[:, None]
    return (total + zero * true - true * (true + 1) / 2) / (true * (n - true))


def _tables(codes: Codes, truth: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best F1 over thresholds, that threshold, and AUC; each ``(C, d_sae)``."""
    f1, thr, auc = [], [], []
    entries = None if codes.indices is None else ranked(codes)
    for lo in range(0, codes.d_sae, chunk):
        hi = min(lo + chunk, codes.d_sae)
        if entries is None:
            z = codes.values[:, lo:hi].detach()
            at = thresholds(z)
            table, area = f1_table(z, truth, at), auroc_table(z, truth)
        else:
            r = entries.of(lo, hi)
            pos = torch.bincount(r.latent[r.value > 0], minlength=hi - lo)
            at = _sparse_thresholds(r, pos)
            table, area = _sparse_f1(r, truth, at), _sparse_auroc(r, truth, pos)
        best, which = table.max(0)
        f1.append(best)
        thr.append(at.gather(0, which))
        auc.append(area)
    return torch.cat(f1, 1), torch.cat(thr, 1), torch.cat(auc, 1).nan_to_num(0)


@torch.no_grad()
def match_concepts(codes: Mapping[str, Codes], truth: Tensor, chunk: int = 512) -> Match:
    """Choose, for each concept, the best latent and threshold on training samples.

    ``codes`` are those of N pairs by modality, or of one, ``truth (N, C)`` says which concepts each pair shows.
    ``chunk`` latents are taken at a time; memory is about ``8 * N * chunk`` floats of dense codes, of top-k codes
    that of their entries and tables of ``chunk * C``.
    """
    tables = {m: _tables(c, truth.to(c.values.device), chunk) for m, c in codes.items()}
    f1 = {m: t[0] for m, t in tables.items()}
    auc = {m: t[2] for m, t in tables.items()}
    if len(codes) > 1:
        f1[SAME] = torch.stack(list(f1.values())).amin(0)
        auc[SAME] = torch.stack(list(auc.values())).amin(0)
    chosen = {side: table.argmax(1) for side, table in f1.items()}
    threshold = {
        side: {m: tables[m][1].gather(1, ids[:, None])[:, 0] for m in (codes if side == SAME else [side])}
        for side, ids in chosen.items()
    }
    return Match(chosen, threshold, {side: table.argmax(1) for side, table in auc.items()})


def _f1(z: Tensor, truth: Tensor, thr: Tensor) -> Tensor:
    fired = z > thr
    f1 = 2 * (fired & truth).sum(0).double() / (fired.sum(0) + truth.sum(0)).clamp(min=1)
    return torch.where(truth.any(0), f1, torch.nan)


@torch.no_grad()
def score_concepts(
    match: Match, codes: Mapping[str, Codes], truth: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Score what :func:`match_concepts` chose elsewhere on codes of held-out pairs and their truth ``(N, C)``.

    Returns:
        F1 and AUC, each ``{side: (C,) float64}``; NaN for a concept that the held-out samples lack (or, for AUC,
        all show).
    """
    f1, auc = {}, {}
    for side, ids in match.f1_latent.items():
        over = match.threshold[side]
        f1[side] = torch.stack([_f1(codes[m].gather(ids).detach(), truth, thr) for m, thr in over.items()]).amin(0)
        auc_ids = match.auc_latent[side]
        auc[side] = torch.stack([auroc_columns(codes[m].gather(auc_ids).detach(), truth) for m in over]).amin(0)
    return f1, auc


def concept_report(
    train: Mapping[str, Codes],
    train_truth: Tensor,
    test: Mapping[str, Codes],
    test_truth: Tensor,
    names: Sequence[str],
    groups: Sequence[str],
) -> dict[str, Any]:
    """Match on training samples, score on held-out ones, and average.

    Args:
        train: ``{"image": codes, "text": codes}`` of N training pairs.
        train_truth: ``(N, C)`` bool.
        test: Codes of M held-out pairs.
        test_truth: ``(M, C)`` bool.
        names: The C concepts.
        groups: The group of each concept (``colour``, ``shape``, ...).

    Returns:
        ``concept_f1.{image,text,same}`` and ``concept_auc.{...}`` (means over the concepts that the held-out samples
        show), ``concept_f1_by_group`` and ``concept_auc_by_group`` (``{side: {group: mean}}``), and ``concepts``: one
        record per concept with ``name``, ``group``, ``latent`` and ``f1``, ``auc`` per side.

    Raises:
        InputError: The truth does not have one column per name.
    """
    if not len(names) == len(groups) == train_truth.shape[1] == test_truth.shape[1]:
        raise InputError(
            f"{len(names)} concept names and {len(groups)} groups for truth of {train_truth.shape[1]} (training) and "
            f"{test_truth.shape[1]} (held-out) columns"
        )
    match = match_concepts(train, train_truth)
    device = next(iter(test.values())).values.device
    scores = dict(zip(("f1", "auc"), score_concepts(match, test, test_truth.to(device)), strict=True))
    member = {g: torch.tensor([h == g for h in groups], device=device) for g in dict.fromkeys(groups)}
    report: dict[str, Any] = {}
    for kind, sides in scores.items():
        report[f"concept_{kind}"] = {side: v.nanmean().item() for side, v in sides.items()}
        report[f"concept_{kind}_by_group"] = {
            side: {g: v[on].nanmean().item() for g, on in member.items()} for side, v in sides.items()
        }
    report["concepts"] = [
        {
            "name": name,
            "group": group,
            "latent": {side: int(ids[c]) for side, ids in match.f1_latent.items()},
            **{kind: {side: float(v[c]) for side, v in sides.items()} for kind, sides in scores.items()},
        }
        for c, (name, group) in enumerate(zip(names, groups, strict=True))
    ]
    return report
