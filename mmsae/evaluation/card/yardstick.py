"""Heads of the card that other benchmarks of vision SAEs report, too: where latents fire, and how far they carry."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from mmsae.evaluation.features import Features
from mmsae.evaluation.images import HostPass, read_images
from mmsae.evaluation.options import RANDOM
from mmsae.evaluation.rows import TRAINED, row
from mmsae.evaluation.suite import NotApplicable, head
from mmsae.evaluation.suite_data import HeadResult, SuiteData
from mmsae.metrics.concepts.probing import matrix
from mmsae.metrics.concepts.spatial import Localisation
from mmsae.metrics.concepts.transfer import Transfer, flat_fvu, on, overlap, sparse_probe
from mmsae.metrics.statistics import bootstrap_mean, wilson
from mmsae.types import IMAGE

SHUFFLED = "shuffled"  # the same values, laid anywhere on the grid


@head
def localised(
    data: SuiteData, set: str = "test", least: int = 5, most: float = 0.9, images: int = 50, low: float = 0.1
) -> HeadResult:
    """Moran's I: do the patches at which a latent fires lie together?

    Args: see :class:`~mmsae.metrics.concepts.spatial.Localisation`; latents with fewer than ``images`` valid images are
    left out, and those below ``low`` are counted.
    """
    if not data.token_site():
        raise NotApplicable("the SAE reads one row per image, which has no place in it")
    f = data.features(set)
    asked = HostPass(data.host, data.sae.sites[IMAGE], IMAGE, False, None, data.run)
    cases = {c: Localisation(data.sae.d_sae, least, most) for c in (TRAINED, RANDOM, SHUFFLED)}
    generator, seen = torch.Generator().manual_seed(data.seed), 0
    for got in read_images(asked, data.suite.paths(set), {*f.uids}, f"{set}: places"):
        cells = len(got.x) // len(got.uids)
        side = isqrt(cells)
        if side * side != cells or not torch.bincount(got.item).eq(cells).all():
            raise NotApplicable(f"{cells} rows per image are no square of patches; read the site's [patches]")
        x, order = got.x.to(data.host.device), _orders(len(got.uids), cells, generator)
        for control, sae in ((TRAINED, data.sae), (RANDOM, data.random)):
            with torch.no_grad():
                z = sae.encode(x, IMAGE)
            cases[control].add(z, (side, side))
            if control == TRAINED:
                cases[SHUFFLED].add(z, (side, side), order.to(x.device))
        seen += len(got.uids)
    rows: list[dict[str, Any]] = []
    for control, case in cases.items():
        scores = case.scores(images)
        scores = scores[~scores.isnan()]
        about = {"features": "code", "control": control, "n": len(scores)}
        mean = scores.mean() if len(scores) else float("nan")
        ends = bootstrap_mean(scores) if len(scores) > 1 else None
        rows.append(row("localised", set, "Moran's I", value=mean, interval=ends, **about))
        few = int((scores < low).sum())
        share = few / len(scores) if len(scores) else float("nan")
        ends = wilson(few, len(scores)) if len(scores) else None
        rows.append(row("localised", set, f"share below {low:g}", value=share, interval=ends, **about))
    note = (
        f"Mean Moran's I on the grid of patches (eight neighbours), over the latents (n) that have {images} images of "
        f"{seen:,} on which they fire at {least} patches or more and at most {most:.0%} of them. {SHUFFLED}: the "
        "same values at shuffled places."
    )
    return HeadResult(rows, notes=[note])


def _orders(n: int, cells: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, cells, generator=generator).argsort(1)


@head
def transfer(data: SuiteData, sets: list[str] | None = None, home: str = "train", k: int = 10) -> HeadResult:
    """Cross-domain composite: reconstruction, coverage, overlap and a sparse probe on sets of another kind."""
    names = sets or data.named("shift", "near_ood", "ood")
    names = [n for n in names if len(data.features(n).labels[data.features(n).labels >= 0].unique()) > 1]
    if not names:
        raise NotApplicable("no set with role shift, near_ood or ood has images of two classes")
    rows: list[dict[str, Any]] = []
    for control in (TRAINED, RANDOM):
        whole = _of(data, home, control)
        at_home = on(whole.z.values, whole.z.indices, whole.z.d_sae)
        composites = []
        for name in names:
            f = _of(data, name, control)
            found, pooled = carried(f, at_home, k)
            composites.append(found.composite)
            about = {"features": "code", "control": control, "n": f.n}
            scores = {"reconstruction": found.reconstruction, "coverage": found.coverage, "jaccard": found.jaccard}
            scores |= {f"probe of {k}": found.probe, "composite": found.composite}
            scores["composite, pooled FVU"] = found._replace(reconstruction=pooled).composite
            rows += [row("transfer", name, score, value=v, **about) for score, v in scores.items()]
        mean = sum(composites) / len(composites)
        about = {"features": "code", "control": control, "n": len(names)}
        rows.append(row("transfer", "all", "composite", value=mean, **about))
    note = (
        f"The composite is the mean of four shares: reconstruction, latents on in {home} that are on there too, the "
        f"Jaccard index of both, and the accuracy of {k} latents on a fifth of the images. Reconstruction takes "
        "visaebench's FVU, to which a mean away from zero adds; the row beside it takes the pooled one."
    )
    return HeadResult(rows, notes=[note])


def _of(data: SuiteData, name: str, control: str) -> Features:
    f = data.features(name) if control == TRAINED else data.control(name, control=control)
    return f if control == TRAINED else f._replace(labels=data.features(name).labels)


def carried(f: Features, at_home: Tensor, k: int = 10, seed: int = 42) -> tuple[Transfer, float]:
    """The four shares of images of another kind, and the reconstruction by the pooled FVU.

    Args:
        f: Their features.
        at_home: ``(d_sae,)`` bool latents that are on at home.
        k: Latents of the probe.
        seed: Of the probe's split.
    """
    fvu = flat_fvu(f.x, f.resid, float(f.sums.square.sum()), float(f.sums.error.sum()), f.sums.rows)
    coverage, jaccard = overlap(at_home, on(f.z.values, f.z.indices, f.z.d_sae))
    classes = f.labels[f.labels >= 0].unique()
    labelled = f.rows(f.labels >= 0)
    y = torch.searchsorted(classes, labelled.labels).numpy()
    share = min(1.0, max(0.0, 1 - fvu))
    found = Transfer(share, coverage, jaccard, sparse_probe(matrix(labelled.z), y, k, seed))
    return found, min(1.0, max(0.0, 1 - f.fvu))
