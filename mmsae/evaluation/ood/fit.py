"""Every OOD detector fitted on every kind of feature, with settings chosen on validation sets.

Detectors are fitted on ID training images. What has a setting (neighbours, dimensions, percentile, profile size) gets
the one with the best AUROC of ID validation images against a separate OOD validation set; test sets are only scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.features import Features
from mmsae.evaluation.ood import detectors as d
from mmsae.evaluation.ood import detectors_sae as ds
from mmsae.evaluation.options import DISTANCES, KINDS, LOGITS, NATIVE
from mmsae.metrics.choice import at_edge
from mmsae.metrics.sparsity import latent_sums
from mmsae.metrics.statistics import auroc
from mmsae.types import Codes

CODES = "codes"  # what the features of a native score are called
GRIDS = {
    "knn": (50, 10, 20, 100, 200, 500, 1000),
    "vim": (256, 16, 32, 64, 128, 512, 1000),
    "react": (90.0, 85.0, 95.0, 99.0),
    "cap_spearman": (256, 64, 1024),
}  # the first is the default and wins ties
CODE_WIDTH, MIN_RATE = 1024, 1e-3
# The k-th nearest of n tells how dense it is around an image only while k is a small part of n: the farthest of all
# training images is nearer to a stranger in the middle of them than to most of themselves.
KNN_SHARE = 0.1
Detector = Callable[[Features], Tensor]
Ladder = Callable[[Features, Sequence[float]], list[Tensor]]  # confidences for several settings at once


class FitImages(NamedTuple):
    """What detectors are fitted and chosen on."""

    train: Features  #: Labelled ID images that detectors are fitted on
    val: Features  #: ID images for choosing settings
    val_ood: Features  #: Images of the OOD validation set
    #: ``{kind: classifier}`` to use in place of a linear probe: zero-shot ones, or the host's own.
    heads: Mapping[str, d.Head] = {}
    grids: Mapping[str, Sequence[float]] = GRIDS  #: ``{score: settings}``, the default first

    def same_sae(self, change: Callable[[Features], Features]) -> FitImages:
        """The same images through something else than the SAE."""
        sets = {s: change(getattr(self, s)) for s in ("train", "val", "val_ood")}
        return self._replace(**sets, heads={})


class Fitted(NamedTuple):
    """Detectors ready to score."""

    detectors: dict[tuple[str, str], Detector]  #: ``{(score, kind): detector}``
    chosen: dict[str, float]  #: ``{"score/kind": setting}`` of those that have one
    classifiers: dict[str, Detector]  #: ``{kind: features -> (n, C) logits}`` of those whose classes are the ID set's
    notes: list[str]  #: What a reader must know: shrinkage, what was left out
    edges: list[str] = []  #: Settings that are an end of their grid (:mod:`mmsae.metrics.choice`)


def code_latents(z: Codes, width: int = CODE_WIDTH, rate: float = MIN_RATE) -> Tensor:
    """Ids of the latents that dense detectors see: those that fire in over ``rate`` of the rows, ``width`` at most."""
    fired = latent_sums(z)[0]
    ids = fired.argsort(descending=True, stable=True)[:width]
    return ids[fired[ids] > rate * z.n].sort().values


def fit_detectors(
    images: FitImages, kinds: Sequence[str] = KINDS, scores: Sequence[str] = (*LOGITS, *DISTANCES, *NATIVE)
) -> Fitted:
    """Fit every detector on every kind of feature, with settings chosen on the validation sets.

    ``embed`` may be among the kinds where the features have the host's embeddings.
    """
    train, chosen = images.train, _Chosen(images)
    notes, out = [], {}
    n_classes = len(train.names)
    classifier: dict[str, d.Head] = {}
    for kind in kinds:
        view = _view(kind, train, notes)
        f = view(train)
        if not f.shape[1]:
            notes.append(f"no latent fires in over {MIN_RATE:.1%} of the training images: no detector sees {kind}")
            continue
        if n_classes > 1 or kind in images.heads:
            classifier[kind] = _classifier(images, kind, f)
            _logit_detectors(out, chosen, scores, kind, view, classifier[kind], f, notes)
        _distance_detectors(out, chosen, scores, kind, view, f, train.labels, n_classes, notes)
    if n_classes < 2 and (lost := [s for s in (*LOGITS, "rmds") if s in scores]):
        where = f" but on {', '.join(classifier)}" if classifier else ""
        notes.append(f"the ID set has 1 class: {', '.join(lost)} are left out{where}")
    _native_detectors(out, chosen, scores, train, classifier.get("code"), n_classes)
    logits = {kind: _on(head, _view(kind, train, [])) for kind, head in classifier.items() if head.known}
    return Fitted(out, chosen.settings, logits, notes, chosen.edges)


def _classifier(images: FitImages, kind: str, f: Tensor) -> d.Head:
    """The classifier that was given (its weights for the latents that are seen), else a linear probe."""
    head = images.heads.get(kind)
    if head is None:
        return d.linear_probe(f, images.train.labels, len(images.train.names))
    return head._replace(weight=head.weight[:, code_latents(images.train.z)]) if kind == "code" else head


def _view(kind: str, train: Features, notes: list[str]) -> Callable[[Features], Tensor]:
    """A function from features to the ``(n, D)`` matrix of a kind."""
    if kind == "code":
        ids = code_latents(train.z)
        if len(ids) < train.z.d_sae:
            notes.append(
                f"detectors on codes see {len(ids)} of {train.z.d_sae} latents: those on in over {MIN_RATE:.1%} of "
                f"the training images, {CODE_WIDTH} at most"
            )
        return lambda f: f.z.gather(ids)
    field = {"raw": "x"}.get(kind, kind)
    return lambda f: getattr(f, field)


class _Chosen:
    """Chooses settings by AUROC on the validation sets."""

    def __init__(self, images: FitImages):
        self.images, self.settings, self.edges = images, {}, []

    def __call__(
        self, name: str, kind: str, ladder: Ladder, limit: int | None = None, grid: Sequence[float] | None = None
    ) -> Detector:
        """The best detector among those of the grid; values above ``limit`` are cut to it."""
        grid = list(self.images.grids[name] if grid is None else grid)
        grid = list(dict.fromkeys(min(g, limit) for g in grid)) if limit else grid
        value = dict.fromkeys(grid, 0.0)
        if len(grid) > 1:
            found = zip(*(ladder(s, grid) for s in (self.images.val, self.images.val_ood)), strict=True)
            value = {g: auroc(a, b) for g, (a, b) in zip(grid, found, strict=True)}
        best = max(grid, key=value.get)  # the first among equals: the default
        self.settings[f"{name}/{kind}"] = best
        self.edges += at_edge(f"{name}/{kind}", best, grid)
        return lambda s: ladder(s, [best])[0]


def _logit_detectors(out, chosen: _Chosen, scores, kind: str, view, head: d.Head, f: Tensor, notes) -> None:
    for name, fn in (("msp", d.msp), ("max_logit", d.max_logit), ("energy", d.energy)):
        if name in scores:
            out[name, kind] = lambda s, fn=fn: fn(head(view(s)))
    if "vim" in scores and f.shape[1] > 1:
        vim = d.ViM.fit(head, f)
        out["vim", kind] = chosen("vim", kind, lambda s, dims: vim.ladder(view(s), dims), f.shape[1] // 2)
    if "react" in scores:
        v = view(chosen.images.val)
        low = head.space(v).min()  # clipped there, as at a low percentile of codes that are mostly 0, nothing is left
        grid = chosen.images.grids["react"]
        react = {p: r for p, r in zip(grid, d.ReAct.fit(head, v, grid), strict=True) if r.threshold > low}
        if react:
            ladder = lambda s, ps: [react[p](view(s)) for p in ps]  # noqa: E731
            out["react", kind] = chosen("react", kind, ladder, grid=list(react))
        else:
            notes.append(f"react on {kind} is left out: every percentile is the smallest activation")


def _distance_detectors(out, chosen: _Chosen, scores, kind, view, f, labels, n_classes, notes) -> None:
    if {"mds", "rmds"} & set(scores):
        shrink = kind == "code" or d.too_few(len(f), f.shape[1], n_classes)
        relative = d.RMDS.fit(f, labels, n_classes, shrink) if "rmds" in scores and n_classes > 1 else None
        classes = d.Gaussians.fit(f, labels, n_classes, shrink) if relative is None else relative.classes
        if shrink:
            few = f", {len(f)} samples for {f.shape[1]} features" if d.too_few(len(f), f.shape[1], n_classes) else ""
            notes.append(f"mds on {kind}: covariance shrunk by {classes.shrinkage:.3f} (Ledoit-Wolf{few})")
        if "mds" in scores:
            out["mds", kind] = _on(d.MDS(classes), view)
        if relative is not None:
            out["rmds", kind] = _on(relative, view)
    if "knn" in scores:
        bank = d.KNN.fit(f)
        most = max(1, int(KNN_SHARE * len(f)))
        out["knn", kind] = chosen("knn", kind, lambda s, ks: bank.ladder(view(s), ks), most)


def _on(detector: Callable[[Tensor], Tensor], view: Callable[[Features], Tensor]) -> Detector:
    return lambda s: detector(view(s))


def _native_detectors(out, chosen: _Chosen, scores, train: Features, head: d.Head | None, n_classes: int) -> None:
    """Scores of an SAE's codes; the predicted class is that of the classifier on codes."""
    if "recon" in scores:
        out["recon", CODES] = ds.recon
    if "rarity" in scores:
        q = ds.firing_rates(train.z)
        out["rarity", CODES] = lambda s: ds.rarity(s.z, q)
    if not {"cap_spearman", "cap_energy", "support"} & set(scores):
        return
    view = _view("code", train, [])
    labels = train.labels if n_classes > 1 else torch.zeros(train.n, dtype=torch.long)
    profiles = ds.Profiles.fit(train.z, labels, max(n_classes, 1))

    def predicted(s: Features) -> Tensor:
        return head(view(s)).argmax(1) if head else torch.zeros(s.n, dtype=torch.long)

    if "support" in scores:
        out["support", CODES] = lambda s: profiles.support(s.z, predicted(s))
    if "cap_energy" in scores:
        out["cap_energy", CODES] = lambda s: profiles.cap_energy(s.z, predicted(s))
    if "cap_spearman" in scores:
        ladder = lambda s, tops: [profiles.cap_spearman(s.z, predicted(s), int(m)) for m in tops]  # noqa: E731
        out["cap_spearman", CODES] = chosen("cap_spearman", CODES, ladder, train.z.d_sae)
