"""Heads of the card that need no classes: reconstruction, its error, monosemanticity, redundancy, pairs, stability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.evaluation.features import Features
from mmsae.evaluation.options import PCA, RANDOM
from mmsae.evaluation.rows import TRAINED, row
from mmsae.evaluation.suite import NotApplicable, head
from mmsae.evaluation.suite_data import HeadResult, SuiteData
from mmsae.metrics.concepts.monosemanticity import monosemanticity
from mmsae.metrics.concepts.similarity import concept_similarity
from mmsae.metrics.concepts.uniqueness import coherence, top_rows, uniqueness
from mmsae.metrics.error_decomposition import ErrorDecomposition
from mmsae.metrics.pairs.bridge import bridge, energy, modality_share, stability
from mmsae.metrics.pairs.modality import CoActivation
from mmsae.metrics.regression import ROWS_PER_DIMENSION
from mmsae.metrics.sparsity import latent_sums
from mmsae.metrics.statistics import bootstrap_mean, bootstrap_ratio, wilson
from mmsae.sae import SAE, with_pursuit
from mmsae.types import IMAGE, TEXT, Tokens

DENSE = 0.1  # share of rows above which a latent that fires is dense


def _of_sums(name: str, features: str, f: Features, control: str, figures: dict[str, tuple[Tensor, Tensor]]):
    """Rows of ratios of sums over all rows (tokens, where there are several an image), resampled by image."""
    rows = int(f.sums.rows.sum())
    return [
        row("core", name, score, features, a.sum() / b.sum(), f.n, control, bootstrap_ratio(a, b), rows=rows)
        for score, (a, b) in figures.items()
    ]


def _reconstruction(name: str, f: Features, control: str) -> list[dict[str, Any]]:
    s = f.sums
    figures = {"fvu": (s.error, s.spread(f.x)), "cosine": (s.cosine, s.rows)}
    figures |= {"norm ratio": (s.ratio, s.rows), "bias ratio": (s.recon, s.dot)}
    return _of_sums(name, "recon", f, control, figures)


def _sparsity(name: str, f: Features, control: str) -> list[dict[str, Any]]:
    out = _of_sums(name, "code", f, control, {"L0": (f.sums.active, f.sums.rows)})
    fired = latent_sums(f.z)[0]
    if f.tokens is not None:
        l0 = f.z.l0().double()
        out.append(row("core", name, "latents per image", "code", l0.mean(), f.n, control, bootstrap_mean(l0)))
        fired = torch.zeros_like(fired).scatter_add_(0, f.z.indices.flatten(), f.tokens.fires.flatten().long())
    density = fired.double() / f.sums.rows.sum()
    for score, share in (("dead share", density == 0), ("dense share", density > DENSE)):
        out.append(row("core", name, score, "code", share.double().mean(), f.n, control, latents=f.z.d_sae))
    return out


def _weights(sae: SAE, control: str) -> list[dict[str, Any]]:
    out = []
    for m in [IMAGE, *(m for m in sae.modalities if m != IMAGE and "shared" not in sae.dictionaries)]:
        atoms = normalize(sae.dictionary(m).rows().detach().double(), dim=1)
        top = torch.cat([(part @ atoms.T).sort(1).values[:, -2] for part in atoms.split(2048)])
        ends = bootstrap_mean(top)
        out.append(row("core", m, "nearest atom cosine", "atoms", top.mean(), len(atoms), control, ends))
        encoder = getattr(sae.encoder, "encoders", {})
        weight = getattr(encoder[m] if m in encoder else sae.encoder, "weight", None)
        if weight is not None and weight.shape == atoms.shape:
            cos = (normalize(weight.detach().double(), dim=1) * atoms).sum(1)
            ends = bootstrap_mean(cos)
            out.append(row("core", m, "encoder atom cosine", "atoms", cos.mean(), len(atoms), control, ends))
    return out


@head
def core(data: SuiteData, modalities: Sequence[str] = (IMAGE, TEXT)) -> HeadResult:
    """Reconstruction and sparsity on held-out images (and texts), of the SAE, of random weights, and of components."""
    rows, notes = [], []
    for m in modalities:
        if m not in data.sae.modalities or m not in data.host.modalities:
            continue
        test, name = data.features("test", m), "test" if m == IMAGE else f"test {m}"
        other, pca = data.control("test", m), data.control("test", m, PCA)
        rows += _reconstruction(name, test, TRAINED) + _sparsity(name, test, TRAINED)
        rows += _reconstruction(name, other, RANDOM) + _sparsity(name, other, RANDOM)
        rows += _reconstruction(name, pca, PCA)
        notes.append(f"pca on {name}: the {pca.z.d_sae} leading components of the training set's activations, as many "
                     "as the code has active latents.")  # fmt: skip
        if test.tokens is not None:
            notes.append(f"{name}: sums over the {int(test.sums.rows.sum()):,} tokens of {test.n:,} images, which "
                         "intervals resample; L0 and the dense share are per token.")  # fmt: skip
    rows += _weights(data.sae, TRAINED) + _weights(data.random, RANDOM)
    if len(data.sae.dictionaries) > 1:
        notes.append(
            "This SAE has a dictionary per modality. In the control with random weights only the first is tied to the "
            "random encoder: it says little about the reconstruction of texts."
        )
    return HeadResult(rows, notes=notes)


@head
def error(
    data: SuiteData, modalities: Sequence[str] = (IMAGE, TEXT), rows: int = 20_000, pursuit: str = ""
) -> HeadResult:
    """What a linear map of the activation predicts of the reconstruction's error, on images it was not fitted on.

    The map is fitted on up to ``rows`` training images. ``pursuit`` (``gp``, ``omp``, ``mp``) shows the same dictionary
    with a pursuit in the encoder's place, at each image's own number of latents.
    """
    saes = {("recon", TRAINED): data.sae, ("recon", RANDOM): data.random}
    if pursuit:
        saes[f"recon, {pursuit} at its own L0", TRAINED] = with_pursuit(data.sae, pursuit)
    figures = {
        "fvu": "fvu", "nonlinear fvu": "fvu_nonlinear", "predictable": "r2", "shrinkage": "identity",
        "best scale": "scale", "predictable, rescaled": "r2_rescaled", "norm predictable": "norm_r2",
    }  # fmt: skip
    out = []
    for m in modalities:
        if m not in data.sae.modalities or m not in data.host.modalities:
            continue
        if data.token_site(m):
            raise NotApplicable("tokens are not held: mmsae.metrics.ErrorDecomposition takes a stream of them")
        fit, test = data.features("train", m), data.features("test", m)
        least = ROWS_PER_DIMENSION * fit.x.shape[1]
        if min(fit.n, rows) < least:
            kind = "images" if m == IMAGE else "texts"
            raise NotApplicable(
                f"a linear map of width {fit.x.shape[1]} needs {least:,} training {kind}, not {min(fit.n, rows):,}"
            )
        name = "test" if m == IMAGE else f"test {m}"
        for (features, control), sae in saes.items():
            found = ErrorDecomposition(sae, m).fit(fit.x[:rows]).evaluate(test.x)
            for score, field in figures.items():
                value = getattr(found, field)
                out.append(row("error", name, score, features, value, test.n, control, fitted_on=found.n_fit))
    return HeadResult(out)


@head
def monosemantic(data: SuiteData, set: str = "test") -> HeadResult:
    """Monosemanticity of features and of raw channels, with the counts of those that have none."""
    f = data.features(set)
    embeddings, judge = data.judge(set)
    rows, curves = [], {}
    for s in data.spaces([data.features("train"), f]):
        m = monosemanticity(s.sets[1], embeddings)
        summary = m.summary()
        about = {k: v for k, v in summary.items() if k not in ("mean", "samples")}
        ends = bootstrap_mean(m.score)
        name = {"features": s.features, "control": s.control, "n": f.n}
        rows.append(row("monosemanticity", set, "MS", value=summary["mean"], interval=ends, **name, **about))
        name["interval"] = tuple(end - m.chance for end in ends)
        rows.append(row("monosemanticity", set, "MS above chance", value=summary["above_chance"], **name))
        curves[s.name] = m.score[m.kind == 0].sort(descending=True).values.tolist()
    note = (
        f"The judge is {judge}; intervals are over features. Chance, the mean cosine of all pairs, is {m.chance:.3f}."
    )
    return HeadResult(rows, {"scores": curves, "judge": judge}, [note])


@head
def unique(data: SuiteData, set: str = "test", top: int = 16) -> HeadResult:
    """Overlap of the features' top images, and how alike these images are to the judge."""
    f = data.features(set)
    embeddings, judge = data.judge(set)
    rows = []
    for s in data.spaces([data.features("train"), f]):
        own = top_rows(s.sets[1], top)
        u, c = uniqueness(own), coherence(own, embeddings)
        about = {"features": s.features, "control": s.control, "n": f.n, "of": u["features"]}
        rows.append(row("uniqueness", set, f"Jaccard of top {top}", value=u["jaccard"], **about))
        rows.append(row("uniqueness", set, "share of near copies", value=u["close"], **about))
        about["interval"] = bootstrap_mean(c)
        rows.append(row("uniqueness", set, f"coherence of top {top}", value=c.nanmean(), **about))
    return HeadResult(rows, notes=[f"Coherence is by {judge}. Raw channels count by their positive values."])


def _aligned(image: Features, text: Features) -> tuple[Features, Features]:
    """The items that both sides have, in the order of the images."""
    at = {u: i for i, u in enumerate(text.uids)}
    both = [i for i, u in enumerate(image.uids) if u in at]
    if len(both) < 2:
        raise NotApplicable(f"the set has {len(both)} pairs of image and text")
    return image.rows(torch.tensor(both)), text.rows(torch.tensor([at[image.uids[i]] for i in both]))


@head
def pairs(data: SuiteData, set: str = "test", top: int = 16, bridges: int = 20, latents: int = 100) -> HeadResult:
    """Modality, co-activation, bridges, and whether a feature's top images and texts mean the same."""
    if TEXT not in data.sae.modalities or TEXT not in data.host.modalities:
        raise NotApplicable("the SAE or its host has no text side")
    if data.sae.signed:
        raise NotApplicable("the code has signs: energies and bridges of images and texts are of codes without")
    rows, more = [], {}
    for control, sae, view in ((TRAINED, data.sae, data.features), (RANDOM, data.random, data.control)):
        image, text = _aligned(view(set), view(set, TEXT))
        about = {"features": "code", "control": control, "n": image.n}
        e = {IMAGE: energy(image.z), TEXT: energy(text.z)}
        share = modality_share(e[IMAGE], e[TEXT])
        alive = int((~share.isnan()).sum())
        kinds = {"image only": share > 0.95, "text only": share < 0.05, "shared": (share >= 0.05) & (share <= 0.95)}
        for kind, on in kinds.items():
            value, ends = on.sum().item() / max(1, alive), wilson(int(on.sum()), alive)
            rows.append(row("pairs", set, f"latents {kind}", value=value, interval=ends, **about | {"n": alive}))
        total = e[IMAGE] + e[TEXT]
        value = total[kinds["shared"]].sum() / total.sum()
        rows.append(row("pairs", set, "energy in shared latents", value=value, **about))
        lift = CoActivation(image.z.d_sae)
        lift.update({IMAGE: image.z, TEXT: text.z}, Tokens.pooled({IMAGE: image.x, TEXT: text.x}, image.uids))
        on = lift.compute()
        value = (kinds["shared"] & (on.lift > 2)).sum().item() / max(1, alive)
        rows.append(row("pairs", set, "shared with lift above 2", value=value, **about | {"n": alive}))
        atoms = [sae.dictionary(m).rows().detach().cpu() for m in (IMAGE, TEXT)]
        b = bridge(image.z, text.z, *atoms, bridges)
        rows.append(row("pairs", set, "bridge mass off the diagonal", value=b.off_diagonal, **about))
        rows.append(row("pairs", set, "bridge mass image to text", value=b.cross_modal, **about))
        known = {u: i for i, u in enumerate(data.features(set).uids)}
        judge = data.judge(set)[0][[known[u] for u in image.uids]]
        tops = [top_rows(side.z, top) for side in (image, text)]
        alike = concept_similarity(*tops, judge, judge, latents, data.seed)
        for score in ("intra", "inter_sym"):
            rows.append(row("pairs", set, score, value=alike[score], of=alike["latents"], **about))
        rows.append(row("pairs", set, "intra - inter", value=alike["intra"] - alike["inter_sym"], **about))
        if not control:
            more["bridges"] = [list(v) for v in zip(b.image.tolist(), b.text.tolist(), b.value.tolist(), strict=True)]
            more["modality"] = share[~share.isnan()].tolist()
    return HeadResult(rows, more, [f"intra and inter are by {data.judge(set)[1]}; lower inter is better."])


@head
def stable(data: SuiteData, modality: str = IMAGE) -> HeadResult:
    """How well atoms match those of other SAEs (other seeds), against random directions."""
    if not data.suite.others:
        raise NotApplicable("the suite names no others to compare with")
    atoms = data.sae.dictionary(modality).rows().detach().cpu()
    weight = energy(data.features("test").z)
    rows = []
    g = torch.Generator().manual_seed(data.seed)
    for name, folder in data.suite.others.items():
        other = SAE.from_pretrained(data.suite.find(folder)).dictionary(modality).rows().detach()
        if other.shape[1] != atoms.shape[1]:
            raise NotApplicable(f"{name} has atoms of width {other.shape[1]}, this SAE of {atoms.shape[1]}")
        for control, against in ((TRAINED, other), (RANDOM, torch.randn(other.shape, generator=g))):
            for score, value in stability(atoms, against, weight).items():
                about = {"features": "atoms", "control": control, "n": len(atoms)}
                rows.append(row("stability", name, score, value=value, **about))
    return HeadResult(rows)
