"""``mmsae zeroshot``: classify images by the names of classes, with the host alone and through an SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.features import Features, load_features, token_site, with_sae
from mmsae.evaluation.labels import Classes, Labels, read_classes, read_labels, read_templates
from mmsae.evaluation.rows import row, write_results
from mmsae.evaluation.zeroshot.head import Split, ZeroShot, at_embedding, text_classes, zero_shot_head
from mmsae.evaluation.zeroshot.scores import ALPHAS, zero_shot_scores
from mmsae.files import atomic_file
from mmsae.hosts import Host
from mmsae.load import load_pair, other_host_warnings
from mmsae.metrics.choice import edge_warning
from mmsae.metrics.pairs.retrieval import cosine_to
from mmsae.metrics.statistics import whiskers
from mmsae.report.tables import markdown_table, text_table
from mmsae.sae import SAE, random_control
from mmsae.shards import draw, expand
from mmsae.types import IMAGE, TEXT, InputError

TUNE_SHARE = 0.2


def zeroshot(
    sae: str,
    shards: str | list[str],
    out: str,
    host: str = "",
    classes: str = "",
    templates: str = "simple",
    label: str = "cls",
    tune: str | list[str] = "",
    concept: str = "code",
    alphas: list[float] = list(ALPHAS),  # noqa: B006  jsonargparse shows it in the help; it is not changed
    control: bool = True,
    limit: int | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    allow_other_site: bool = False,
    cache: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Zero-shot classification: raw embeddings, reconstructions, codes, and embeddings enhanced by codes.

    Args:
        sae: SAE folder or hub id. One at the embeddings of images and texts has all four; one elsewhere in the image
            tower has ``recon``: the host goes on from the reconstruction.
        shards: Labelled images.
        out: Folder to write.
        host: Host by name, with a text encoder; default: the one that the SAE's site names.
        classes: File of class names: text (one a line) or json (a list, or {label: name}); default: the names that
            the data's json field ``class`` or label gives.
        templates: ``simple`` (open_clip's 7), ``openai`` (its 80 for ImageNet), or a file, one template with {} a line.
        label: ``cls``, or the field of json that holds the label.
        tune: Labelled images on which alpha is chosen; default: a fifth of ``shards`` by a hash of the uid, which is
            then not scored.
        concept: What enhances: ``code`` or ``recon``.
        alphas: Weights that are tried; 0 is plain CLIP.
        control: Whether to run an SAE of equal size with random weights, too.
        limit: At most so many images, chosen by a hash of their uid.
        batch_size: Images per forward pass. Default: 256; on a CPU as many as have the area of 16 images of 224 pixels.
        workers: Decoding processes.
        seed: Of the random SAE and the bootstrap.
        device: ``cpu``, ``cuda`` or ``auto``.
        precision: Of the host: ``fp32``, ``bf16`` or ``fp16``.
        allow_other_site: Accept an SAE that was trained on another host of equal width, such as a copy of its own.
        cache: Folder in which the host's activations are kept, so that another SAE of this site, or another of the
            commands ``ood``, ``evaluate`` and ``zeroshot``, need not run the host again; empty: none.
        progress: Whether to print and show bars.

    Returns:
        ``rows``, ``warnings``, and the folder as ``out``.

    Raises:
        InputError: Names and labels that do not fit, one class only, no image, or a host without texts.
    """
    trained = SAE.from_pretrained(sae) if isinstance(sae, str) else sae
    model, loaded = load_pair(trained, host, device, precision, allow_other_site)
    warnings = other_host_warnings(trained, loaded)
    paths = expand(shards)
    known = read_labels(paths, label)
    if classes:
        named = read_classes(classes, known)
    else:
        values = known.values_of(list(known.value))
        named = Classes([known.name_of(v) for v in values], values)
        if len(values) < 2:
            raise InputError(f"{paths[0]} and {len(paths) - 1} other shards have {len(values)} class: 2 are needed")
    tune_known = read_labels(expand(tune), label) if tune else known
    for labels in (known, tune_known):
        _refuse_unknown(labels, named)
    prompts = read_templates(templates)
    if progress:
        print(f"zeroshot: {len(named.names)} classes, {len(prompts)} templates, {len(paths)} shards")
    vectors = text_classes(loaded, named.names, prompts)
    job = _Job(loaded, named, vectors, label, limit, loaded.batch_size(batch_size), workers, progress, cache)
    saes = {"": model, **({"random": random_control(model, seed)} if control else {})}
    held = {u for u in known.value if not tune and draw(u, 6) < TUNE_SHARE}
    test_uids = known.labelled() - held
    tune_uids = tune_known.labelled() if tune else known.labelled() & held
    test_of = job.scores(saes, paths, test_uids, "test")
    tune_of = job.scores(saes, tune or paths, tune_uids, "tuning")
    warnings += class_warnings(named, test_of[""].split.labels, classes or "the data")
    if bare := len(known.value) - len(known.labelled()):
        warnings.append(f"{bare} of the {len(known.value)} images have no label and are left out")
    if same := len(test_uids & tune_uids):
        warnings.append(f"{same} of the {len(test_uids)} test images are tuning images, too: alpha has seen them")
    results, rows = {}, []
    for name in saes:
        results[name] = zero_shot_head(
            test_of[name].split, tune_of[name].split, concept=concept, alphas=alphas, control=name, seed=seed
        )
        rows += results[name].rows
        n = len(test_of[name].split.labels)
        rows.append(row("zeroshot", "test", "explained_variance", "recon", test_of[name].explained, n, name))
    warnings += edge_warning([e for found in results.values() for e in found.edges])
    main = results[""]
    about = {
        "head": "zeroshot", "sae": str(sae), "site": str(model.sites[IMAGE]), "host": loaded.hint,
        "shards": shards, "tune": tune or f"{TUNE_SHARE:.0%} of the shards, by uid", "label": label,
        "classes": named.names, "templates": prompts, "images": {"test": len(test_of[""].split.labels),
        "tuning": len(tune_of[""].split.labels)}, "chance": 1 / len(named.names), "concept": concept,
        "alpha": main.alpha, "tuning": main.tuning, "warnings": warnings,
        "per_class": {k: dict(zip(named.names, _plain(v), strict=True)) for k, v in main.per_class.items()},
        "images_per_class": dict(zip(named.names, main.counts.tolist(), strict=True)),
    }  # fmt: skip
    folder = Path(out)
    write_results(folder, rows, about)
    with atomic_file(folder / "table.md") as temp:
        temp.write_text(markdown(rows, main.alpha, warnings))
    plot(rows, main, folder / "zeroshot.png", 1 / len(named.names))
    if progress:
        shown = [[r["features"], r["control"] or "-", r["score"], r["value"], r.get("low"), r.get("high"), r["n"]]
                 for r in rows]  # fmt: skip
        for warning in warnings:
            print(f"warning: {warning}")
        print(text_table(shown, ["features", "control", "score", "value", "low", "high", "n"]))
    return {"rows": rows, "warnings": warnings, "out": str(folder)}


class _Scores(NamedTuple):
    split: Split
    explained: float


class _Job(NamedTuple):
    host: Host
    classes: Classes
    vectors: Tensor
    label: str
    limit: int | None
    batch_size: int
    workers: int
    progress: bool
    cache: str = ""

    def load(
        self, sae: SAE, shards: Any, uids: set[str] | None, desc: str, embed: bool, cache: str, **more: Any
    ) -> Features:
        return load_features(
            self.host, sae, shards, label=self.label, classes=self.classes.values, limit=self.limit, embed=embed,
            keep=None if uids is None else uids.__contains__, batch_size=self.batch_size, workers=self.workers,
            cache=cache, progress=self.progress, desc=desc, **more,
        )  # fmt: skip

    def through(self, sae: SAE, shards: Any, uids: set[str] | None, desc: str) -> Tensor:
        """``(n, e)`` embeddings of a host that goes on from the SAE's reconstruction."""
        with self.host.edit(sae.sites[IMAGE], lambda rows: sae.decode(sae.encode(rows, IMAGE), IMAGE)):
            return self.load(sae, shards, uids, desc, True, "").embed

    def scores(self, saes: dict[str, SAE], shards: Any, uids: set[str], desc: str) -> dict[str, _Scores]:
        """Scores of every SAE: from one pass at the embeddings, else with the host run on from its reconstruction."""
        model = saes[""]
        joint = at_embedding(model)
        others = {k: s for k, s in saes.items() if k} if token_site(model.sites[IMAGE]) else {}
        f = self.load(model, shards, uids, desc, not joint, self.cache, others=others)
        out = {}
        for name, sae in saes.items():
            x = f.x if joint else f.embed
            view = f
            if name:
                view = f.through(f.others[name]) if name in f.others else with_sae(f, sae)
            if joint and TEXT in sae.modalities:
                scores = zero_shot_scores(sae, x.to(self.host.device), self.vectors)
            else:
                seen = view.recon if joint else self.through(sae, shards, uids, f"{desc}, {name or 'reconstructed'}")
                scores = {"raw": cosine_to(self.vectors)(x), "recon": cosine_to(self.vectors)(seen)}
            out[name] = _Scores(Split({k: s.cpu() for k, s in scores.items()}, f.labels), 1 - view.fvu)
        return out


def _refuse_unknown(known: Labels, named: Classes) -> None:
    """Refuse labels that no class has: they could only count as errors."""
    values = set(named.values)
    if odd := [v for v in known.value.values() if v is not None and v not in values]:
        said = ", ".join(map(known.name_of, list(dict.fromkeys(odd))[:3]))
        raise InputError(
            f"{len(odd)} of the {len(known.value)} images have a label that none of the {len(values)} classes has, "
            f"such as {said}"
        )


def class_warnings(named: Classes, labels: Tensor, source: str) -> list[str]:
    """What to say about classes without images: they compete, but are not in the mean per class."""
    count = torch.bincount(labels, minlength=len(named.names))
    empty = [n for n, c in zip(named.names, count.tolist(), strict=True) if not c]
    out = []
    if empty:
        out.append(f"{len(empty)} of the {len(named.names)} classes of {source} have no test image: "
                   f"{', '.join(empty[:10])}; the mean per class leaves them out")  # fmt: skip
    if int((count > 0).sum()) == 1:
        out.append(f"all {len(labels)} test images are of one class: accuracies say little")
    return out


def _plain(values: Tensor) -> list[float | None]:
    return [None if v != v else v for v in values.tolist()]


def markdown(rows: list[dict[str, Any]], alpha: float | None, warnings: list[str]) -> str:
    """One line per kind of features and control, intervals in brackets."""
    table = []
    for control, kind in dict.fromkeys((r["control"], r["features"]) for r in rows if "low" in r):
        own = {r["score"]: r for r in rows if (r["control"], r["features"]) == (control, kind) and "low" in r}
        cells = [
            f"{own[s]['value']:.3f} ({own[s]['low']:.3f}–{own[s]['high']:.3f})" for s in ("top1", "top5", "balanced")
        ]
        table.append([kind, control or None, *cells, own["top1"]["n"]])
    lines = [markdown_table(["features", "control", "top-1", "top-5", "mean per class", "n"], table)]
    for r in rows:
        if r["score"] == "explained_variance" and r["value"] is not None:
            lines += ["", f"Explained variance ({r['control'] or 'the SAE'}): {r['value']:.3f}"]
    if alpha is not None:
        lines += ["", f"alpha = {alpha:g}, chosen on the tuning split"]
    return "\n".join([*lines, *(["", *(f"- {w}" for w in warnings)] if warnings else [])]) + "\n"


def plot(rows: list[dict[str, Any]], main: ZeroShot, path: Path, chance: float) -> None:
    """Top-1 with intervals, trained and random; and top-1 on the tuning split against alpha."""
    from matplotlib.figure import Figure

    from mmsae.report.figures import GREY, PALETTE, write_png

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = list(main.per_class)
    for j, (control, colour) in enumerate((("", PALETTE[0]), ("random", GREY))):
        own = {r["features"]: r for r in rows if r["score"] == "top1" and r["control"] == control}
        for i, kind in enumerate(kinds):
            if r := own.get(kind):
                error = whiskers(r["value"], r["low"], r["high"])
                left.bar(i + 0.4 * j - 0.2, r["value"], 0.36, yerr=[[e] for e in error], color=colour, capsize=2,
                         label=(control or "SAE") if i == 0 else None)  # fmt: skip
    left.axhline(chance, color=GREY, lw=0.8, ls=":", label="chance")
    left.set_xticks(range(len(kinds)), kinds)
    left.set(ylabel="top-1, 95% interval", ylim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    if main.tuning:
        right.plot(list(main.tuning), list(main.tuning.values()), "o-", color=PALETTE[1], ms=4)
        right.axvline(main.alpha, color=GREY, lw=0.8, ls=":")
        right.set(xlabel="alpha", ylabel="top-1 on the tuning split")
    else:
        right.set_axis_off()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    write_png(figure, path)
