"""What every multimodal SAE reports about pairs: do the two codes of a pair agree, and do they agree for good reasons?

Definitions: share of true against shuffled pairs, one latent in both modalities, retrieval with ties against the truth,
hubs. See also :mod:`mmsae.metrics.pairs.correlation` for pair scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.kernels.pairs import code_cosine
from mmsae.metrics.pairs.correlation import cross_correlation
from mmsae.metrics.pairs.retrieval import both_ways
from mmsae.metrics.sparsity import sparsity
from mmsae.types import IMAGE, TEXT, Codes, InputError

SHUFFLED_COSINE_BOUND = 0.6  # spec bounds above which a run is warned about: shuffled pairs that look alike
HUB_BOUND = 0.5  # and latents that fire in more than this share of the rows of both modalities


def derangement(n: int, seed: int = 0, same: Tensor | None = None) -> Tensor:
    """``(n,)`` permutation that leaves no element in place, nor in its own group; a function of the arguments.

    Partners of one group of ``same (n,)`` (ids of equal captions) count as the same.

    Raises:
        InputError: One group holds more than half of the rows, so no such permutation exists.
    """
    same = torch.arange(n) if same is None else same.cpu()
    largest = int(same.unique(return_counts=True)[1].max()) if n else 0
    if n < 2 or 2 * largest > n:
        raise InputError(f"cannot mismatch {n} pairs of which {largest} share one caption")
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=g)
    out = torch.empty(n, dtype=torch.long)
    out[order] = order.roll(-1)  # one cycle through all rows: nobody stays
    for _ in range(100):  # repair clashes of equal groups by exchanging partners with random others
        bad = (same[out] == same).nonzero().flatten()
        if not len(bad):
            return out
        pool = torch.cat([bad, torch.randperm(n, generator=g)[: 2 * len(bad) + 8]]).unique()
        trial = out.clone()
        trial[pool] = out[pool[torch.randperm(len(pool), generator=g)]]
        if (same[trial] == same).sum() <= len(bad):
            out = trial
    # a group of nearly half of the rows: shifting the rows, sorted by group, by its size is always a solution
    order = same.argsort(stable=True)
    out[order] = order.roll(-largest)
    return out


def top_concept(codes: Codes) -> Tensor:
    """``(N,)`` the strongest latent of each row, whatever its sign (the lowest id among equals), -1 for none."""
    size = codes.values.abs()
    best = size.amax(1, keepdim=True)
    ids = torch.arange(codes.d_sae, device=best.device) if codes.indices is None else codes.indices
    top = torch.where(size == best, ids, codes.d_sae).amin(1)
    return torch.where(best[:, 0] > 0, top, -1)


def _sign_at(codes: Codes, latent: Tensor) -> Tensor:
    """``(N,)`` sign of one latent in each row."""
    ids = torch.arange(codes.d_sae, device=latent.device) if codes.indices is None else codes.indices
    return torch.where(ids == latent[:, None], codes.values, 0).sum(1).sign()


def top_concept_agreement(image: Codes, text: Codes) -> float:
    """Share of pairs whose strongest latent is the same on both sides, signs included; a zero code agrees with none."""
    a, b = top_concept(image), top_concept(text)
    same = (a == b) & (a >= 0) & (_sign_at(image, a) == _sign_at(text, b))
    return same.double().mean().item()


class ModalityScore(NamedTuple):
    """Where the energy of the latents lies."""

    #: ``(d_sae,)`` ``E_image / (E_image + E_text)``, E the mean squared value over rows; NaN for dead latents
    mu: Tensor
    latents: float  #: Share of living latents that are bimodal
    energy: float  #: Share of the energy that lies in bimodal latents


def modality_score(energy_image: Tensor, energy_text: Tensor, low: float = 0.05, high: float = 0.95) -> ModalityScore:
    """Modality scores from ``(d_sae,)`` mean squared values; bimodal is ``low <= mu <= high``."""
    total = energy_image + energy_text
    mu = torch.where(total > 0, energy_image / total, torch.nan)
    both = (mu >= low) & (mu <= high)
    alive = total > 0
    return ModalityScore(mu, (both.sum() / alive.sum()).item(), (total[both].sum() / total.sum()).item())


def alive_counts(density_image: Tensor, density_text: Tensor) -> dict[str, int]:
    """Number of latents that fired in both modalities, in one only, in none."""
    image, text = density_image > 0, density_text > 0
    both, one = int((image & text).sum()), int((image ^ text).sum())
    return {"both": both, "one": one, "none": len(image) - both - one}


@torch.no_grad()
def pair_report(
    image: Codes,
    text: Codes,
    *,
    same: Tensor | None = None,
    x: Mapping[str, Tensor] | None = None,
    x_hat: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    ks: tuple[int, ...] = (1, 5, 10),
) -> dict[str, Any]:
    """Everything that a multimodal run reports about pairs, as plain numbers.

    Args:
        image: Codes of the images of N pairs.
        text: Codes of their texts, row by row.
        same: ``(N,)`` ids of equal captions (:func:`mmsae.metrics.pairs.retrieval.groups_of`): right answers of
            each other in retrieval, never shuffled partners.
        x: ``{modality: (N, d)}`` host embeddings in one space, for their own retrieval beside that of the codes.
        x_hat: ``{modality: (N, d)}`` reconstructions, likewise.
        seed: Seed of the shuffled pairs.
        ks: Retrieval cut-offs.

    Returns:
        ``code_cosine.{pair,shuffled,difference}``, ``recall.{code,embedding,recon}.{image_to_text,text_to_image}.{k}``,
        ``recall_at_1`` (codes, mean of both directions), ``top_concept_agreement``, ``bimodal.{latents,energy}``,
        ``correlation.{median,above_half}`` over latents alive in at least one modality, with 0 where it is undefined
        because the other side never fired, ``alive.{both,one,none}``, ``dead_fraction`` (alive in none),
        ``l0.{image,text}``, ``hubs`` (share of latents over 10 % per modality, ids over 50 % in both) and ``warnings``.
    """
    if image.n != text.n or image.d_sae != text.d_sae:
        raise InputError(
            f"pairs need equal rows and latents, got {image.n} x {image.d_sae} image "
            f"and {text.n} x {text.d_sae} text codes"
        )
    perm = derangement(image.n, seed, same).to(text.values.device)
    pair, shuffled = code_cosine(image, text).mean().item(), code_cosine(image, text.rows(perm)).mean().item()
    stats = {IMAGE: sparsity(image), TEXT: sparsity(text)}
    density = torch.stack([stats[IMAGE].density, stats[TEXT].density])
    alive = alive_counts(*density)
    corr = cross_correlation(image, text)[(density > 0).any(0)].nan_to_num(0)
    bimodal = modality_score(stats[IMAGE].energy, stats[TEXT].energy)
    recall = {"code": both_ways(image, text, same, ks)}
    for name, side in (("embedding", x), ("recon", x_hat)):
        if side is not None:
            recall[name] = both_ways(side[IMAGE], side[TEXT], same, ks)
    report = {
        "pairs": image.n,
        "code_cosine": {"pair": pair, "shuffled": shuffled, "difference": pair - shuffled},
        "recall": recall,
        "recall_at_1": sum(recall_at_k[1] for recall_at_k in recall["code"].values()) / 2 if 1 in ks else None,
        "top_concept_agreement": top_concept_agreement(image, text),
        "bimodal": {"latents": bimodal.latents, "energy": bimodal.energy},
        "correlation": {
            "median": corr.median().item() if len(corr) else float("nan"),
            "above_half": (corr > 0.5).double().mean().item(),
        },
        "alive": alive,
        "dead_fraction": alive["none"] / image.d_sae,
        "l0": {m: s.l0.item() for m, s in stats.items()},
        "hubs": {
            **{m: s.hub_fraction.item() for m, s in stats.items()},
            "both": (density.amin(0) > HUB_BOUND).nonzero().flatten().tolist(),
        },
    }
    report["warnings"] = warnings_of(report)
    return report


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """Sentences about a :func:`pair_report` that looks better than it is; empty for a healthy one."""
    out = []
    shuffled = report["code_cosine"]["shuffled"]
    if shuffled > SHUFFLED_COSINE_BOUND:
        out.append(
            f"shuffled pairs have code cosine {shuffled:.2f} (bound {SHUFFLED_COSINE_BOUND}): the codes "
            f"are alike whatever the pair, so the {report['code_cosine']['pair']:.2f} of true pairs means "
            "little; weaken the coupling"
        )
    if hubs := report["hubs"]["both"]:
        named = ", ".join(map(str, hubs[:5])) + (", ..." if len(hubs) > 5 else "")
        out.append(f"{len(hubs)} latents fire on more than {HUB_BOUND:.0%} of both modalities (hubs): {named}")
    return out
