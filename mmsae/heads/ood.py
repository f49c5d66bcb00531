"""OOD detection as one head: every detector on raw features, codes, reconstruction and residual, beside its controls.

Detectors are fitted on ID training images. What has a setting (neighbours, dimensions, percentile, profile size) gets
the one with the best AUROC of ID validation images against a separate OOD validation set; test sets are only scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.heads import detectors as d
from mmsae.heads import detectors_sae as ds
from mmsae.heads.features import KINDS, Features, with_sae
from mmsae.heads.rows import row
from mmsae.metrics.ood import OODMetrics, auroc_interval, ood_metrics
from mmsae.metrics.sparsity import latent_sums
from mmsae.sae import SAE, random_control
from mmsae.types import IMAGE, Codes

ID = "id"
LOGITS, DISTANCES = ("msp", "max_logit", "energy", "vim", "react"), ("mds", "rmds", "knn")
NATIVE = ("recon", "cap_spearman", "cap_energy", "rarity", "support")
EMBED, CODES = "embed", "codes"  # kind of the host's own embeddings; what the features of a native score are called
GRIDS = {
    "knn": (50, 10, 20, 100, 200, 500, 1000),
    "vim": (256, 16, 32, 64, 128, 512, 1000),
    "react": (90.0, 85.0, 95.0, 99.0),
    "cap_spearman": (256, 64, 1024),
}  # the first is the default and wins ties
CODE_WIDTH, MIN_RATE = 1024, 1e-3
CONTROLS = ("random", "pca", "statistics")
Detector = Callable[[Features], Tensor]


class Setup(NamedTuple):
    """What detectors are fitted and chosen on.

    Attributes:
        train: Labelled ID images that detectors are fitted on.
        val: ID images for choosing settings.
        val_ood: Images of the OOD validation set.
        heads: ``{kind: classifier}`` to use in place of a linear probe, e.g. zero-shot ones.
        grids: ``{score: settings}``, the default first.
    """

    train: Features
    val: Features
    val_ood: Features
    heads: Mapping[str, d.Head] = {}
    grids: Mapping[str, Sequence[float]] = GRIDS

    def same_sae(self, change: Callable[[Features], Features]) -> Setup:
        """The same images through something else than the SAE."""
        sets = {s: change(getattr(self, s)) for s in ("train", "val", "val_ood")}
        return self._replace(**sets, heads={k: h for k, h in self.heads.items() if k in ("raw", EMBED)})


class Fitted(NamedTuple):
    """Detectors ready to score.

    Attributes:
        detectors: ``{(score, kind): detector}``.
        chosen: ``{"score/kind": setting}`` of those that have one.
        accuracy: ``{kind: (share, n)}`` ID accuracy of each kind's classifier on the validation images.
        notes: What a reader must know: shrinkage, what was left out.
    """

    detectors: dict[tuple[str, str], Detector]
    chosen: dict[str, float]
    accuracy: dict[str, tuple[float, int]]
    notes: list[str]


def code_latents(z: Codes, width: int = CODE_WIDTH, rate: float = MIN_RATE) -> Tensor:
    """Ids of the latents that dense detectors see: those that fire in over ``rate`` of the rows, ``width`` at most."""
    fired = latent_sums(z)[0]
    ids = fired.argsort(descending=True, stable=True)[:width]
    return ids[fired[ids] > rate * z.n].sort().values


def fit_detectors(
    setup: Setup, kinds: Sequence[str] = KINDS, scores: Sequence[str] = (*LOGITS, *DISTANCES, *NATIVE)
) -> Fitted:
    """Fit every detector on every kind of feature, with settings chosen on the validation sets.

    Args:
        setup: The sets.
        kinds: ``raw``, ``code``, ``recon``, ``resid``; ``embed`` where the features have the host's embeddings.
        scores: Which detectors.
    """
    train, chosen = setup.train, _Chosen(setup)
    notes, out = [], {}
    n_classes = len(train.names)
    classifier: dict[str, d.Head] = {}
    for kind in kinds:
        view = _view(kind, train, notes)
        f = view(train)
        if n_classes > 1:
            classifier[kind] = setup.heads.get(kind) or d.linear_probe(f, train.labels, n_classes)
            _logit_detectors(out, chosen, scores, kind, view, classifier[kind], f)
        _distance_detectors(out, chosen, scores, kind, view, f, train.labels, n_classes, notes)
    if n_classes < 2:
        notes.append(f"the ID set has 1 class: {', '.join(s for s in (*LOGITS, 'rmds') if s in scores)} are left out")
    _native_detectors(out, chosen, scores, train, classifier.get("code"), n_classes)
    accuracy = {}
    for kind, head in classifier.items():
        hit = head(_view(kind, train, [])(setup.val)).argmax(1) == setup.val.labels
        accuracy[kind] = (hit.double().mean().item(), len(hit))
    return Fitted(out, chosen.settings, accuracy, notes)


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

    def __init__(self, setup: Setup):
        self.setup, self.settings = setup, {}

    def __call__(self, name: str, kind: str, make: Callable[[Any], Detector], limit: int | None = None) -> Detector:
        """The best detector among those of the grid; values above ``limit`` are cut to it."""
        grid = list(self.setup.grids[name])
        grid = list(dict.fromkeys(min(g, limit) for g in grid)) if limit else grid
        found = {}
        for g in grid:
            detector = make(g)
            value = ood_metrics(detector(self.setup.val), detector(self.setup.val_ood)).auroc if len(grid) > 1 else 0.0
            found[g] = (value, detector)
        best = max(grid, key=lambda g: found[g][0])  # the first among equals: the default
        self.settings[f"{name}/{kind}"] = best
        return found[best][1]


def _logit_detectors(out, chosen: _Chosen, scores, kind: str, view, head: d.Head, f: Tensor) -> None:
    for name, fn in (("msp", d.msp), ("max_logit", d.max_logit), ("energy", d.energy)):
        if name in scores:
            out[name, kind] = lambda s, fn=fn: fn(head(view(s)))
    if "vim" in scores and f.shape[1] > 1:
        vim = d.ViM.fit(head, f)
        out["vim", kind] = chosen("vim", kind, lambda dim: _on(vim.at(dim, f), view), f.shape[1] // 2)
    if "react" in scores:
        v = view(chosen.setup.val)
        out["react", kind] = chosen("react", kind, lambda p: _on(d.ReAct.fit(head, v, p), view))


def _distance_detectors(out, chosen: _Chosen, scores, kind, view, f, labels, n_classes, notes) -> None:
    if {"mds", "rmds"} & set(scores):
        shrink = kind == "code" or d.too_few(len(f), f.shape[1], n_classes)
        classes = d.Gaussians.fit(f, labels, n_classes, shrink)
        if shrink:
            few = f", {len(f)} samples for {f.shape[1]} features" if d.too_few(len(f), f.shape[1], n_classes) else ""
            notes.append(f"mds on {kind}: covariance shrunk by {classes.shrinkage:.3f} (Ledoit-Wolf{few})")
        if "mds" in scores:
            out["mds", kind] = _on(d.MDS(classes), view)
        if "rmds" in scores and n_classes > 1:
            out["rmds", kind] = _on(d.RMDS(classes, d.Gaussians.fit(f, shrink=shrink)), view)
    if "knn" in scores:
        bank = d.KNN.fit(f)
        out["knn", kind] = chosen("knn", kind, lambda k: _on(bank.at(int(k)), view), len(f))


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
        make = lambda m: lambda s: profiles.cap_spearman(s.z, predicted(s), int(m))  # noqa: E731
        out["cap_spearman", CODES] = chosen("cap_spearman", CODES, make, train.z.d_sae)


def pca_control(train: Features, k: int) -> Callable[[Features], Features]:
    """Features in which the SAE is replaced by the k leading principal components of the training features."""
    k = max(1, min(k, train.x.shape[1] - 1))
    mean = train.x.double().mean(0)
    x = train.x.double() - mean
    basis = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors.flip(1)[:, :k]

    def change(f: Features) -> Features:
        z = (f.x.double() - mean) @ basis
        recon = (mean + z @ basis.T).float()
        resid = f.x - recon
        error = resid.double().square().sum(1) / f.x.double().square().sum(1).clamp(min=1e-12)
        return f._replace(z=Codes(z.float(), None, k, f.z.modality), recon=recon, resid=resid, error=error)

    return change


class Scored(NamedTuple):
    """What the head returns.

    Attributes:
        rows: Uniform rows; ``value`` is the AUROC, beside it the other figures of ``OODMetrics``.
        conf: ``{(control, score, features): {set: (n,) confidences}}``; the set ``id`` is the ID test set.
        chosen: ``{control: {"score/kind": setting}}``.
        notes: What a reader must know.
    """

    rows: list[dict[str, Any]]
    conf: dict[tuple[str, str, str], dict[str, Tensor]]
    chosen: dict[str, dict[str, float]]
    notes: list[str]


def ood_head(
    setup: Setup,
    test: Features,
    ood: Mapping[str, Features],
    *,
    sae: SAE | None = None,
    near: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
    scores: Sequence[str] = (*LOGITS, *DISTANCES, *NATIVE),
    controls: Sequence[str] = CONTROLS,
    random: Callable[[str, Features], Features] | None = None,
    modality: str = IMAGE,
    seed: int = 0,
) -> Scored:
    """Score all detectors and controls on all sets.

    Args:
        setup: What detectors are fitted and chosen on.
        test: ID test images.
        ood: ``{name: features}`` of the OOD test sets.
        sae: The SAE, for the ``random`` control (one of equal size with fresh weights).
        near: Names of the near-OOD sets; the others are far.
        kinds: Kinds of features.
        scores: Detectors.
        controls: ``random``, ``pca`` (as many components as the code has entries), ``statistics`` (a Gaussian on plain
            picture statistics).
        random: ``(set name, features) -> features`` of the random SAE where they cannot be computed from ``x``.
        modality: Whose SAE.
        seed: Of the random SAE.
    """
    sets = {ID: test, **ood}
    out = Scored([], {}, {}, [])
    _score(out, "", fit_detectors(setup, kinds, scores), sets)
    coded = [k for k in kinds if k in ("code", "recon", "resid")]
    if "random" in controls and sae is not None:
        fresh = random_control(sae, seed)
        change = random or (lambda _, f: with_sae(f, fresh, modality))
        named = iter(("train", "val", "val_ood"))
        again = setup.same_sae(lambda f: change(next(named), f))
        changed = {name: change(name, f) for name, f in sets.items()}
        _score(out, "random", fit_detectors(again, coded, scores), changed)
    if "pca" in controls:
        k = round(setup.train.z.l0().double().mean().item())
        change = pca_control(setup.train, k)
        own = [s for s in scores if s not in NATIVE or s == "recon"]
        changed = {name: change(f) for name, f in sets.items()}
        _score(out, "pca", fit_detectors(setup.same_sae(change), coded, own), changed)
        out.notes.append(f"control pca: {changed[ID].z.d_sae} components, the mean number of latents on per image")
    if "statistics" in controls and all(f.stats is not None for f in (setup.train, *sets.values())):
        detector = d.MDS(d.Gaussians.fit(setup.train.stats))
        _score(out, "statistics", Fitted({("mds", "pixels"): lambda f: detector(f.stats)}, {}, {}, []), sets)
    out.rows.extend(group_means(out.rows, list(ood), near))
    return out


def _score(out: Scored, control: str, fitted: Fitted, sets: Mapping[str, Features]) -> None:
    """Confidences and rows of all detectors on all sets."""
    prefix = f"control {control}: " if control else ""
    out.notes.extend(prefix + note for note in dict.fromkeys(fitted.notes))
    out.chosen[control] = fitted.chosen
    for kind, (share, n) in fitted.accuracy.items():
        out.rows.append(row("ood", "id (validation)", "id_accuracy", kind, share, n, control))
    for (score, kind), detector in fitted.detectors.items():
        conf = {name: detector(f) for name, f in sets.items()}
        out.conf[control, score, kind] = conf
        for name, values in conf.items():
            if name == ID:
                continue
            m = ood_metrics(conf[ID], values)
            low, high = auroc_interval(conf[ID], values)
            figures = m._asdict()
            out.rows.append(row("ood", name, score, kind, m.auroc, m.n_id + m.n_ood, control, low=low, high=high,
                                **figures))  # fmt: skip


def group_means(rows: Sequence[Mapping[str, Any]], names: Sequence[str], near: Sequence[str]) -> list[dict[str, Any]]:
    """Unweighted means over the near sets and over the far ones, as rows of the sets ``near`` and ``far``."""
    figures = OODMetrics._fields[:5]
    out = []
    for group, members in (("near", set(near) & set(names)), ("far", set(names) - set(near))):
        by: dict[tuple, list] = {}
        for r in rows:
            if r["set"] in members:
                by.setdefault((r["control"], r["score"], r["features"]), []).append(r)
        for (control, score, kind), some in by.items():
            mean = {k: sum(r[k] for r in some) / len(some) for k in figures}
            n = sum(r["n_ood"] for r in some)
            out.append(row("ood", group, score, kind, mean["auroc"], some[0]["n_id"] + n, control, sets=len(some),
                           **mean, n_id=some[0]["n_id"], n_ood=n))  # fmt: skip
    return out
