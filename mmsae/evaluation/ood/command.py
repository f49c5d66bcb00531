"""``mmsae ood``: does the model notice what it has never seen? Every detector, on raw features and through an SAE."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmsae.evaluation.features import KINDS, token_site
from mmsae.evaluation.labels import read_classes, read_labels, read_lines, read_templates
from mmsae.evaluation.ood.figures import markdown, plot_ood
from mmsae.evaluation.ood.fit import DISTANCES, EMBED, LOGITS, NATIVE, Setup
from mmsae.evaluation.ood.head import CONTROLS, Scored, ood_head
from mmsae.evaluation.ood.sets import Sources, keep_names, load_sets, named_shards, shared_classes, shared_images
from mmsae.evaluation.rows import write_results
from mmsae.evaluation.spaces import RANDOM
from mmsae.evaluation.zeroshot.head import (
    at_classifier,
    at_embedding,
    host_heads,
    logits_of,
    text_classes,
    whose_logits,
    zero_shot_heads,
)
from mmsae.files import atomic_file
from mmsae.load import load_pair, other_host_warnings
from mmsae.metrics.choice import edge_warning
from mmsae.sae import SAE, random_control
from mmsae.shards import expand
from mmsae.types import IMAGE, InputError

SCORES = (*LOGITS, *DISTANCES, *NATIVE)


def ood(
    sae: str,
    id: str | list[str],
    ood: list[str],
    out: str,
    host: str = "",
    near: list[str] = [],  # noqa: B006  jsonargparse shows it in the help; it is not changed
    train: str | list[str] = "",
    val: str | list[str] = "",
    ood_val: list[str] = [],  # noqa: B006
    label: str = "cls",
    ood_label: str = "",
    exclude: str = "",
    classes: str = "",
    templates: str = "simple",
    logits: str = "auto",
    features: list[str] = list(KINDS),  # noqa: B006
    scores: list[str] = list(SCORES),  # noqa: B006
    controls: list[str] = list(CONTROLS),  # noqa: B006
    pool: str = "max",
    limit: int | None = None,
    fit_limit: int | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    allow_other_site: bool = False,
    cache: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Detect out-of-distribution images with every detector on raw features, codes, reconstruction and residual.

    Args:
        sae: SAE folder or hub id; of any image site, e.g. image.pooled or image.embed.
        id: In-distribution shards with labels; split by uid into train, validation and test, or with ``train``
            the test alone.
        ood: OOD test sets as NAME=SHARDS, one or more.
        out: Folder to write.
        host: Host by name; default: the one that the SAE's site names.
        near: Names of the near-OOD sets; the others are far.
        train: ID shards for fitting, all that the SAE has seen for example, and for choosing settings (a third of
            them by uid, where there is no ``val``).
        val: ID shards for choosing settings.
        ood_val: OOD validation set as NAME=SHARDS, on which settings are chosen; default: scrambled and noise
            pictures made from ID validation images.
        label: ``cls``, or the field of json that holds the ID label; empty: no labels, detectors without classes.
        ood_label: Field of json that ``exclude`` is about, in the OOD sets; default: ``label``.
        exclude: File with label values or class names to leave out of the OOD sets, one a line.
        classes: File of class names, for logits by text.
        templates: ``simple``, ``openai``, or a file of prompt templates.
        logits: Whose logits detectors read: ``host`` (its own classifier, of raw features and reconstructions where it
            reads them, else of its embeddings), ``zeroshot`` (by ``classes``), ``probe`` (linear, of the ID labels), or
            ``auto``: the first of these that there is. Features without such a classifier get a linear probe.
        features: Of raw, code, recon, resid.
        scores: Detectors.
        controls: Of random (an untrained SAE), pca (as many components as latents are on), statistics (of pixels).
        pool: Of token sites: ``max`` or ``mean`` over an image's tokens.
        limit: At most so many images per set, chosen by a hash of their uid.
        fit_limit: The same for ``train`` and ``val``; default: ``limit``.
        batch_size: Images per forward pass. Default: 256; on a CPU as many as have the area of 16 images of 224 pixels.
        workers: Decoding processes.
        seed: Of the random SAE.
        device: ``cpu``, ``cuda`` or ``auto``.
        precision: Of the host: ``fp32``, ``bf16`` or ``fp16``.
        allow_other_site: Accept an SAE that was trained on another host of equal width, such as a copy of its own.
        cache: Folder in which the host's activations are kept, so that another SAE of this site, or another of the
            commands ``ood``, ``evaluate`` and ``zeroshot``, need not run the host again; empty: none.
        progress: Whether to print and show bars.

    Returns:
        ``rows``, ``notes``, ``warnings``, and the folder as ``out``.

    Raises:
        InputError: No image of a set, labels or names that do not fit, unknown names in a list.
    """
    for flag, given, known in (("features", features, KINDS), ("scores", scores, SCORES),
                               ("controls", controls, CONTROLS)):  # fmt: skip
        if odd := [g for g in given if g not in known]:
            raise InputError(f"--{flag} has {odd[0]!r}, there are {', '.join(known)}")
    sets_of, named_val = named_shards(ood, "--ood"), named_shards(ood_val, "--ood-val")
    near = keep_names(near, list(sets_of))
    trained = SAE.from_pretrained(sae) if isinstance(sae, str) else sae
    model, loaded = load_pair(trained, host, device, precision, allow_other_site)
    warnings = other_host_warnings(trained, loaded)
    if IMAGE not in model.modalities:
        raise InputError(f"SAE {sae} has no image modality, only {', '.join(model.modalities)}")
    named = read_classes(classes, read_labels(expand(train or id)[:1], label)) if classes else None
    whose = whose_logits(logits, loaded, bool(named) and label != "")
    at_head = at_classifier(model, loaded) if whose == "host" else whose == "probe" or at_embedding(model)
    fresh = random_control(model, seed)
    tokens = token_site(model.sites[IMAGE])  # which are not held: what else is to read them does so in the same pass
    others = {RANDOM: fresh} if RANDOM in controls and tokens else {}
    what = Sources(
        id, sets_of, train, val, named_val, label, named.values if named else None, ood_label,
        read_lines(exclude) if exclude else (), limit, fit_limit, pool, loaded.batch_size(batch_size), workers,
        not at_head, progress, cache, others,
    )  # fmt: skip
    if progress:
        print(f"ood: {len(sets_of)} sets against {id}; {len(scores)} detectors, controls {', '.join(controls)}")
    sets = load_sets(loaded, model, what)
    heads, of_controls = {}, {}
    if whose == "host":
        heads, of_controls = host_heads(model, loaded)
    elif whose == "zeroshot":
        names = [named.names[named.values.index(v)] for v in sets.train.values]
        vectors = text_classes(loaded, names, read_templates(templates))
        heads = zero_shot_heads(model, vectors, loaded.logit_scale)
        of_controls = {"random": zero_shot_heads(fresh, vectors, loaded.logit_scale)}
    again = (lambda _, f: f.through(f.others[RANDOM])) if tokens else None
    kinds = [*features, *([EMBED] if EMBED in heads else [])]
    scored = ood_head(
        Setup(sets.train, sets.val, sets.val_ood, heads), sets.test, sets.ood, sae=model, near=near, kinds=kinds,
        scores=scores, controls=controls, random=again, heads=of_controls, seed=seed,
        say=(lambda said: print(f"ood: {said}", flush=True)) if progress else lambda said: None,
    )  # fmt: skip
    warnings += [
        f"OOD set {name} has classes of the ID set: {', '.join(shared[:10])}; --exclude FILE leaves them out"
        for name, shared in shared_classes(sets.train, sets.ood).items()
    ] + shared_images("ID test", sets.test, sets.train.uids + sets.val.uids, "training or validation")
    if named_val:
        warnings += [w for n, f in sets.ood.items() for w in shared_images(n, f, sets.val_ood.uids, "OOD validation")]
    warnings += edge_warning(scored.edges)
    about = {
        "head": "ood", "sae": str(sae), "sae_training": sae_training(sae), "site": str(model.sites[IMAGE]),
        "host": loaded.hint, "id": id, "ood": sets_of, "near": near, "train": train, "val": val, "label": label,
        "ood_validation": sets.val_ood_is, "classes": sets.train.names, "pool": sets.test.pool, "seed": seed,
        "logits": logits_of(kinds, heads, len(sets.train.names)),
        "fitted_on": fitted_on(scores, sets.train.n, sae_training(sae)),
        "images": {name: f.n for name, f in sets.by_name().items()}, "chosen": scored.chosen,
        "notes": [*sets.notes, *scored.notes], "warnings": warnings,
    }  # fmt: skip
    folder = write_ood(out, scored, about, list(sets_of))
    if progress:
        print("\n".join([*(f"warning: {w}" for w in warnings), markdown(scored.rows, list(sets_of))]))
    return {"rows": scored.rows, "notes": about["notes"], "warnings": warnings, "out": str(folder)}


def fitted_on(scores: Sequence[str], n: int, training: Mapping[str, Any]) -> dict[str, int | None]:
    """``{score: images or rows that it was fitted on}``; the SAE's error was fitted when the SAE was."""
    return {s: training.get("rows", {}).get(IMAGE) if s == "recon" else n for s in scores}


def sae_training(sae: str) -> dict[str, Any]:
    """What the SAE's folder says about its training: conclusions from ``recon`` depend on what it has seen."""
    file = Path(sae) / "cfg.json"
    return json.loads(file.read_text())["mmsae"]["training"] if file.is_file() else {}


def write_ood(out: str | Path, scored: Scored, about: dict[str, Any], names: list[str]) -> Path:
    """``results.json``, ``tables.md``, ``scores.npz`` (``control|features|score|set``) and ``ood.png``."""
    folder = Path(out)
    write_results(folder, scored.rows, about)
    with atomic_file(folder / "tables.md") as temp:
        temp.write_text(markdown(scored.rows, names, about["notes"], about["warnings"]))
    arrays = {
        f"{control}|{kind}|{score}|{name}": values.numpy()
        for (control, score, kind), sets in scored.conf.items()
        for name, values in sets.items()
    }
    with atomic_file(folder / "scores.npz") as temp, temp.open("wb") as handle:
        np.savez_compressed(handle, **arrays)
    plot_ood(scored, names, folder / "ood.png")
    return folder
