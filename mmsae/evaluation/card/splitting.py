"""Heads of the card about how concepts are divided among features: absorption by children, targeted ablation.

Both work in the units of the atoms: normalised activations minus the dictionary's bias, where a code times the atoms is
the reconstruction and ablating a feature is a subtraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.features import Features
from mmsae.evaluation.options import RANDOM
from mmsae.evaluation.rows import TRAINED, row
from mmsae.evaluation.suite import NotApplicable, head
from mmsae.evaluation.suite_data import HeadResult, SuiteData
from mmsae.metrics.concepts.absorption import absorption, effects, fit_binary, main_features, tpp
from mmsae.metrics.statistics import bootstrap_mean
from mmsae.sae import SAE
from mmsae.types import IMAGE, Codes


class SplitFeatures(NamedTuple):
    """Images in the units of the atoms."""

    x: Tensor  #: ``(n, d)`` activations
    z: Codes  #: Their codes


@torch.no_grad()
def _side(sae: SAE, f: Features) -> SplitFeatures:
    """Activations and codes; at token sites means over the image's tokens: decoding is linear, a maximum is not."""
    dictionary, z = sae.dictionary(IMAGE), f.z
    if f.tokens is None:
        x = sae.normaliser(f.x.to(dictionary.like), IMAGE)[0]
    else:
        x, z = f.tokens.x.to(dictionary.like), f.z._replace(values=f.tokens.z)
    x = x if dictionary.bias is None else x - dictionary.bias
    return SplitFeatures(x.cpu(), z)


def _cases(data: SuiteData, name: str) -> list[tuple[str, SAE, Features]]:
    return [(TRAINED, data.sae, data.features(name)), (RANDOM, data.random, data.control(name))]


@head
def absorbed(data: SuiteData, nodes: int = 40, least: int = 20) -> HeadResult:
    """Absorption: do features of a concept's children take over from the concept's own?"""
    if not data.suite.trees:
        raise NotApplicable("the suite names no trees")
    rows = []
    for name in data.suite.trees:
        tree = data.tree(name)
        inner = tree.internal[tree.sizes[tree.internal] <= tree.classes // 2]
        inner = inner[tree.sizes[inner].argsort(descending=True, stable=True)][:nodes]
        for (control, sae, fit), (_, _, held) in zip(_cases(data, "train"), _cases(data, "test"), strict=True):
            fit, held = (f.rows(f.labels >= 0) for f in (fit, held))
            train, test = _side(sae, fit), _side(sae, held)
            atoms, fractions, full = sae.dictionary(IMAGE).rows().detach().cpu(), [], []
            for node in inner.tolist():
                member = tree.member[node].bool()
                truth, said = member[fit.labels], member[held.labels]
                if min(int(truth.sum()), int((~truth).sum()), int(said.sum())) < least:
                    continue
                probe = fit_binary(train.x, truth)
                yes = said & (test.x.double() @ probe.weight + probe.bias > 0)
                if yes.any():
                    main = main_features(train.z, truth)
                    found = absorption(test.x[yes], test.z.rows(yes), atoms, probe.weight, main)
                    fractions.append(found.fraction.mean())
                    full.append(found.full.double().mean())
            if not fractions:
                raise NotApplicable(f"no node of {name} has {least} images in train and test")
            for score, values in (("absorption", fractions), ("full absorption", full)):
                v = torch.stack(values)
                about = {"features": "code", "control": control, "n": len(v), "interval": bootstrap_mean(v)}
                rows.append(row("absorption", name, score, value=v.mean().item(), **about))
    note = (
        "n is nodes of the tree; lower is better. Random atoms lie at random angles to every probe: that control is "
        "the level of a dictionary without concepts."
    )
    return HeadResult(rows, notes=[note])


@head
def targeted(data: SuiteData, ns: Sequence[int] = (1, 2, 5, 10, 20, 50), most: int = 30) -> HeadResult:
    """Targeted probe perturbation: does ablating a concept's features hurt its probe and no other?"""
    rows = []
    (_, truth, names), (_, said, _) = data.concepts("train"), data.concepts("test")
    enough = (truth.sum(0) >= 20) & ((~truth).sum(0) >= 20) & (said.sum(0) >= 20) & ((~said).sum(0) >= 20)
    ids = enough.nonzero()[:, 0][:most]
    if len(ids) < 2:
        raise NotApplicable(f"{len(ids)} of {len(names)} concepts have 20 images with and without them, 2 are needed")
    truth, said = truth[:, ids], said[:, ids]
    keep = [data.concepts(n)[0].uids for n in ("train", "test")]
    for (control, sae, fit), (_, _, held) in zip(_cases(data, "train"), _cases(data, "test"), strict=True):
        train, test = (_side(sae, _only(f, uids)) for f, uids in zip((fit, held), keep, strict=True))
        atoms = sae.dictionary(IMAGE).rows().detach().cpu()
        probes = [fit_binary(train.x, truth[:, c]) for c in range(len(ids))]
        chosen = []
        for c, probe in enumerate(probes):
            e = effects(train.z, truth[:, c], atoms, probe.weight)
            order = e.argsort(descending=True)
            chosen.append(order[e[order] > 0])
        for n in ns:
            value = tpp(test.x, test.z, atoms, said, probes, chosen, n)
            about = {"features": "code", "control": control, "n": len(test.x), "concepts": len(ids)}
            rows.append(row("TPP", "test", f"{n} ablated", value=value, **about))
        if not control:
            right = torch.stack([p.right(test.x, said[:, c]) for c, p in enumerate(probes)], 1).double().mean(1)
            about = {"n": len(test.x), "interval": bootstrap_mean(right), "concepts": len(ids)}
            rows.append(row("TPP", "test", "accuracy before", "raw", right.mean().item(), **about))
    return HeadResult(
        rows, notes=["Accuracy lost by a concept's own probe minus the mean lost by the others; higher is better."]
    )


def _only(f: Features, uids: Sequence[str]) -> Features:
    at = {u: i for i, u in enumerate(f.uids)}
    return f.rows(torch.tensor([at[u] for u in uids]))
