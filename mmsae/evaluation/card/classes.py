"""Heads of the card that need classes: probes, generalisation, ontology, loss recovered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmsae.evaluation.generalisation import SPARSE, generalisation
from mmsae.evaluation.ontology.measures import class_sets, lca_depth, lch, retrieval_coverage, signed, tree_correlation
from mmsae.evaluation.options import KINDS, PCA, RANDOM
from mmsae.evaluation.rows import TRAINED, row
from mmsae.evaluation.spaces import CONTROLS, Space
from mmsae.evaluation.suite import NotApplicable, head
from mmsae.evaluation.suite_data import HeadResult, SuiteData
from mmsae.metrics.choice import edge_warning
from mmsae.metrics.concepts.class_means import ClassMeans, as_codes
from mmsae.metrics.concepts.probing import L2, sparse_probing
from mmsae.metrics.concepts.uniqueness import top_rows
from mmsae.metrics.host.recovered import zero_shot_recovered
from mmsae.metrics.statistics import bootstrap_mean, wilson
from mmsae.types import Codes


@head
def probes(data: SuiteData, ks: Sequence[int] = (1, 2, 5), kinds: Sequence[str] = KINDS, l2: float = 1.0) -> HeadResult:
    """k-sparse probing: how few features tell a concept, and how many all of them together."""
    (train, truth, names), (test, test_truth, _) = data.concepts("train"), data.concepts("test")
    rows, table = [], {}
    for s in data.spaces([train, test], kinds=kinds):
        found = sparse_probing(s.sets[0], truth, s.sets[1], test_truth, ks, l2=l2, seed=data.seed)
        scored = ~found.accuracy[0].isnan()
        if not scored.any():
            raise NotApplicable(f"none of {len(names)} concepts has 20 images with and without it in train and test")
        n = int(found.test[scored].sum())
        about = {"features": s.features, "control": s.control, "n": n, "concepts": int(scored.sum())}
        for k, accuracy in found.accuracy.items():
            name = f"{k}-sparse" if k else "all features"
            value, worst = accuracy[scored].mean().item(), accuracy[scored].amin().item()
            ends = bootstrap_mean(accuracy)
            rows.append(row("probes", "test", name, value=value, interval=ends, worst=worst, **about))
        table[s.name] = {names[i]: found.accuracy[ks[0]][i].item() for i in scored.nonzero()[:, 0].tolist()}
    note = "Accuracy on balanced test images, .5 is chance; means over concepts, intervals over concepts."
    return HeadResult(rows, {"one feature": table}, [note])


@head
def shifted(
    data: SuiteData,
    kinds: Sequence[str] = KINDS,
    controls: Sequence[str] = CONTROLS,
    sparse: Sequence[int] = SPARSE,
    grid: Sequence[float] = L2,
) -> HeadResult:
    """Generalisation: probes trained on source images, scored on shifted ones."""
    targets = data.named("shift")
    if not targets:
        raise NotApplicable("the suite has no data with role shift")
    if "val" not in data.suite.data:
        raise NotApplicable("the suite has no val set, on which L2 strengths are chosen")
    if data.quick:
        sparse, grid = tuple(sparse)[:2], tuple(grid)[::2]
    train, val, source = (data.labelled(n) for n in ("train", "val", "test"))
    sets = {n: data.labelled(n) for n in targets}
    found = generalisation(data.sae, train, val, source, sets, kinds, controls, sparse, grid, data.seed)
    n = {"train": train.n, "val": val.n, "test": source.n} | {k: v.n for k, v in sets.items()}
    note = "Images: " + ", ".join(f"{k} {v:,}" for k, v in n.items())
    return HeadResult(found.pop("rows"), found, [note], edge_warning(found["edges"]))


def _nonnegative(s: Space) -> list[Codes]:
    """Codes as they are; channels as positive and negative parts about the training mean."""
    if isinstance(s.sets[0], Codes):
        return s.sets
    mean = s.sets[0].mean(0)
    return [Codes(x := signed(v, mean), None, x.shape[1]) for v in s.sets]


def _means(x: Tensor | Codes, labels: Tensor, classes: int) -> Tensor:
    means = ClassMeans(classes, as_codes(x).d_sae, sync_on_compute=False)
    means.update(x, labels)
    return means.compute()


@head
def ontology(
    data: SuiteData,
    kinds: Sequence[str] = ("raw", "code", "recon"),
    controls: Sequence[str] = (RANDOM,),
    draws: int = 200,
    top: int = 16,
    groups: Sequence[float] = (),
    threshold: float = 0.1,
    rate: float = 0.5,
) -> HeadResult:
    """Lowest common hypernyms, purity, coverage and tree correlation, for each tree of the suite."""
    if not data.suite.trees:
        raise NotApplicable("the suite names no trees")
    train, test = data.labelled("train"), data.labelled("test")
    classes, rows, more = len(train.names), [], {}
    draws = min(draws, 100) if data.quick else draws
    built = data.spaces([train, test], controls=controls, kinds=kinds)
    for name in data.suite.trees:
        tree = data.tree(name)
        for s in built:
            about = {"features": s.features, "control": s.control}
            t = tree_correlation(tree, _means(s.sets[0], train.labels, classes), draws, data.seed)
            rows.append(row("ontology", name, "tree correlation", value=t["value"], n=t["pairs"], p=t["p"], **about))
            own = _nonnegative(s)
            sets = class_sets(own[0], train.labels, classes, threshold, rate)
            found = lch(tree, sets.sets, draws, data.seed)
            many = found["sizes"]["more"]
            for score in ("height", "purity", "coverage", "coverage_f1"):
                f = found.get(score, {"value": float("nan")})
                rows.append(row("ontology", name, f"LCH {score}" if score == "height" else score, n=many,
                                **f, of=found["sizes"], **about))  # fmt: skip
            r = retrieval_coverage(tree, own[0], train.labels, own[1], test.labels)
            if r["nodes"]:
                extra = {"n": r["nodes"], "coverage": r["coverage"], **about}
                rows.append(row("ontology", name, "best F1 of a node", value=r["f1"], **extra))
            d = lca_depth(tree, top_rows(own[0], top), train.labels, groups)
            about |= {"n": d["features"], "interval": bootstrap_mean(d["depth"]), "groups": d["groups"]}
            rows.append(row("ontology", name, f"LCA depth of top {top}", value=d["mean"], **about))
            more.setdefault(name, {})[s.name] = {"heights": found["heights"], "by_depth": r["by_depth"]}
    note = (
        f"n is features (pairs of classes for tree correlation). LCH height and purity are means over features that "
        f"stand for two or more of {classes} classes; the null exchanges classes {draws} times. Channels count as two "
        "features each, above and below their mean."
    )
    return HeadResult(rows, more, [note])


@head
def recovered(data: SuiteData, sets: Sequence[str] = ("test",)) -> HeadResult:
    """Loss recovered: zero-shot classification by the host from reconstructions instead of embeddings."""
    prompts = data.prompts
    if data.host.logit_scale is None:
        raise NotApplicable("the host has no logit scale")
    rows: list[dict[str, Any]] = []
    for name in sets:
        f = data.labelled(name)
        keep = data.features(name).labels >= 0
        cases = [(c, data.control(name, control=c).recon[keep]) for c in (RANDOM, PCA)]
        for control, x in [(TRAINED, f.recon), *cases]:
            z = zero_shot_recovered(f.x, x, prompts, f.labels, data.host.logit_scale)
            about = {"features": "recon", "control": control, "n": f.n}
            rows += [row("recovered", name, s.replace("_", " "), value=getattr(z, s), **about)
                     for s in ("recovered_zero", "recovered_mean", "recovered_kl", "reconstructed")]  # fmt: skip
            for score in ("top1_reconstructed", "agreement"):
                value = getattr(z, score)
                ends = wilson(value * f.n, f.n)
                rows.append(row("recovered", name, score.replace("_", " "), value=value, interval=ends, **about))
        about = {"features": "raw", "control": TRAINED, "n": f.n}
        rows += [row("recovered", name, k, value=v, **about) for k, v in
                 (("clean", z.clean), ("zero", z.zero), ("mean", z.mean), ("top1 clean", z.top1_clean))]  # fmt: skip
    return HeadResult(rows, notes=[f"Cross-entropies in nats with the host's logit scale {data.host.logit_scale:.1f}."])
