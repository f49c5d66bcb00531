"""Headline claims of papers, and what is seen of them here, by rules that were fixed before the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from mmsae.bench.recover import fast

Worlds = Mapping[str, Mapping[str, Mapping[str, float]]]
"""``{world: {variant: {figure: mean over seeds}}}``."""


class Claim(NamedTuple):
    """What a paper says, and how it is asked here."""

    text: str  #: The claim, with its source.
    needs: tuple[tuple[str, str], ...]  #: ``(world, variant)`` pairs without which it cannot be asked.
    seen: Callable[[Worlds], bool]  #: Whether the figures say so.
    figures: tuple[tuple[str, str, str], ...]  #: ``(world, variant, figure)`` that are shown beside the answer.


def _higher(world: str, figure: str, a: str, *others: str, by: float = 0.0) -> Callable[[Worlds], bool]:
    """Whether ``a`` has more of a figure than every other, by at least ``by``."""
    return lambda w: all(w[world][a][figure] > w[world][o][figure] + by for o in others)


def _lower(world: str, figure: str, a: str, *others: str, by: float = 0.0) -> Callable[[Worlds], bool]:
    return lambda w: all(w[world][a][figure] < w[world][o][figure] - by for o in others)


def _claim(text: str, seen: Callable[[Worlds], bool], world: str, names: tuple[str, ...], *figures: str) -> Claim:
    shown = tuple((world, name, figure) for figure in figures for name in names)
    return Claim(text, tuple((world, name) for name in names), seen, shown)


CLAIMS = (
    _claim(
        "MP-SAE keeps parents on where their children are: less absorption than TopK, BatchTopK and Matryoshka on a "
        "hierarchy (arXiv 2506.03093)",
        _lower("hierarchical", "absorption", "mp_sae", "topk", "batch_topk", "matryoshka", by=0.05),
        "hierarchical",
        ("mp_sae", "topk", "batch_topk", "matryoshka"),
        "absorption",
        "cosine",
    ),
    _claim(
        "Pursuit reconstructs better than TopK at equal k without finding more: lower FVU, lower precision "
        "(arXiv 2602.14687: it reconstructs superposition noise)",
        lambda w: _lower("independent", "fvu", "mp_sae", "topk")(w)
        and _lower("independent", "precision", "mp_sae", "topk")(w),
        "independent",
        ("mp_sae", "topk"),
        "fvu",
        "precision",
        "cosine",
    ),
    _claim(
        "GBA recovers the features, also where frequencies differ: at least .95 of the atoms above cosine .9 "
        "(arXiv 2506.14002)",
        lambda w: w["heavy_tailed"]["gba"]["found"] >= 0.95,
        "heavy_tailed",
        ("gba", "topk", "relu_l1"),
        "found",
        "cosine",
        "l0",
    ),
    _claim(
        "Feature Choice has no dead features and fewer than TopK, at no higher FVU (arXiv 2411.02124)",
        lambda w: w["heavy_tailed"]["feature_choice"]["dead"] == 0
        and w["heavy_tailed"]["topk"]["dead"] > 0
        and not _higher("heavy_tailed", "fvu", "feature_choice", "topk")(w),
        "heavy_tailed",
        ("feature_choice", "topk"),
        "dead",
        "fvu",
    ),
    _claim(
        "AbsTopK finds concepts with two ends that TopK misses at equal k (arXiv 2510.00404)",
        _higher("bidirectional", "found", "abs_topk", "topk", by=0.1),
        "bidirectional",
        ("abs_topk", "topk", "batch_topk"),
        "found",
        "fvu",
    ),
    _claim(
        "g-SAE has a lower downstream loss than TopK at equal k, evaluated without gradients (arXiv 2411.10397)",
        _lower("downstream", "ce", "gradient_topk", "topk"),
        "downstream",
        ("gradient_topk", "topk"),
        "ce",
        "ce_raw",
        "fvu",
    ),
    _claim(
        "top-AFA needs no k: FVU within a factor 1.5 of TopK's with the true k (arXiv 2503.24277)",
        lambda w: w["independent"]["top_afa"]["fvu"] <= 1.5 * w["independent"]["topk"]["fvu"],
        "independent",
        ("top_afa", "topk"),
        "fvu",
        "l0",
        "precision",
    ),
    _claim(
        "vSAE has more dead features than TopK, a negative result (arXiv 2509.22994)",
        _higher("heavy_tailed", "dead", "vsae_fixed", "topk"),
        "heavy_tailed",
        ("vsae_fixed", "vsae", "topk"),
        "dead",
        "fvu",
    ),
    _claim(
        "ITDA costs a tenth of a trained SAE's time or less, and reconstructs worse (arXiv 2505.17769)",
        lambda w: w["independent"]["itda"]["seconds"] <= 0.1 * w["independent"]["topk"]["seconds"]
        and _higher("independent", "fvu", "itda", "topk")(w),
        "independent",
        ("itda", "topk"),
        "seconds",
        "fvu",
    ),
    _claim(
        "About half of a TopK SAE's error vector is linearly predictable from the activation (arXiv 2410.14670)",
        lambda w: 0.35 <= w["independent"]["topk"]["predictable"] <= 0.65,
        "independent",
        ("topk", "batch_topk", "relu_l1"),
        "predictable",
    ),
    _claim(
        "Frozen decoders come close to trained SAEs: at least .9 of TopK's explained variance (arXiv 2602.14111)",
        lambda w: 1 - w["independent"]["topk (decoder frozen)"]["fvu"] >= 0.9 * (1 - w["independent"]["topk"]["fvu"]),
        "independent",
        ("topk (decoder frozen)", "topk", "topk (untrained)"),
        "fvu",
        "cosine",
    ),
    _claim(
        "SAEs that learn from whole conversations leave less error on special tokens than ones that learn from packed "
        "blocks (FAST, arXiv 2506.07691)",
        fast.seen,
        fast.NAME,
        tuple(f"{variant} ({way})" for variant in fast.VARIANTS for way in fast.WAYS),
        "mse_special",
        "mse_other",
        "l0",
    ),
)  # fmt: skip


def answers(worlds: Worlds) -> list[tuple[str, str, str]]:
    """``(claim, seen / not seen / not asked, figures)`` of every claim."""
    out = []
    for claim in CLAIMS:
        lacking = [f"{v} on {w}" for w, v in claim.needs if v not in worlds.get(w, {})]
        lacking += [f"{f} of {v} on {w}" for w, v, f in claim.figures if f not in worlds.get(w, {}).get(v, {})]
        if lacking:
            out.append((claim.text, "not asked", f"without {lacking[0]}"))
            continue
        shown: dict[str, list[str]] = {}
        for w, v, figure in claim.figures:
            shown.setdefault(figure, []).append(f"{v} {worlds[w][v][figure]:.3f}")
        said = "; ".join(f"{figure}: {', '.join(values)}" for figure, values in shown.items())
        out.append((claim.text, "seen" if claim.seen(worlds) else "not seen", said))
    return out
