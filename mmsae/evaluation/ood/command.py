"""``mmsae ood``: does the model notice what it has never seen? Every detector, on raw features and through an SAE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmsae.evaluation.options import EMBED, RANDOM, ClassTexts, Detection, EvaluationRun, Labelled, OODSets


def ood(
    sae: str,
    id: str | list[str],
    ood: list[str],
    out: str,
    host: str = "",
    seed: int = 0,
    beside: OODSets = OODSets(),
    images: Labelled = Labelled(),
    texts: ClassTexts = ClassTexts(),
    detection: Detection = Detection(),
    run: EvaluationRun = EvaluationRun(),
) -> dict[str, Any]:
    """Detect out-of-distribution images with every detector on raw features, codes, reconstruction and residual.

    Args:
        sae: SAE folder or hub id; of any image site, e.g. image.pooled or image.embed.
        id: Shards of the in-distribution set, with labels; split by uid into train, validation and test, or with
            ``train`` the test alone.
        ood: OOD test sets as NAME=SHARDS, one or more.
        out: Folder to write.
        host: Host by name; default: the one that the SAE's site names.
        seed: Seed of the random SAE.
        beside: The other sets.
        images: Which of the images.
        texts: Classes as texts, for logits by text.
        detection: Detectors, features and controls.
        run: How to compute.

    Returns:
        ``rows``, ``notes``, ``warnings``, and the folder as ``out``.

    Raises:
        InputError: No image of a set, labels or names that do not fit, unknown names in a list.
    """
    from mmsae.evaluation.features import token_site
    from mmsae.evaluation.labels import read_classes, read_labels, read_templates
    from mmsae.evaluation.ood.classifiers import at_classifier, check_logits, classifiers, logits_of, whose_logits
    from mmsae.evaluation.ood.fit import FitImages
    from mmsae.evaluation.ood.head import check_names, ood_head
    from mmsae.evaluation.ood.report import fitted_on, markdown, sae_training, write_ood
    from mmsae.evaluation.ood.sets import OODShards, load_sets, named_shards, set_warnings
    from mmsae.evaluation.zeroshot.head import at_embedding, text_classes
    from mmsae.load import load_pair, other_host_warnings
    from mmsae.metrics.choice import edge_warning
    from mmsae.sae import SAE, random_control
    from mmsae.sae.random_control import without_rows
    from mmsae.shards import expand
    from mmsae.types import IMAGE, InputError

    check_names(detection)
    named_classes = texts.classes != "" and images.label != ""
    check_logits(detection.logits, named_classes)
    ood_shards, val_shards = named_shards(ood, "--ood"), named_shards(beside.ood_val, "--ood-val")
    near = list(beside.near)
    if unknown := [n for n in near if n not in ood_shards]:
        raise InputError(f"--near names {unknown[0]!r}, the OOD sets are {', '.join(ood_shards)}")
    trained = SAE.from_pretrained(sae) if isinstance(sae, str) else sae
    model, loaded = load_pair(trained, host, run.device, run.precision, run.allow_other_site)
    if IMAGE not in model.modalities:
        raise InputError(f"SAE {sae} has no image modality, only {', '.join(model.modalities)}")
    named = None
    if texts.classes:
        named = read_classes(texts.classes, read_labels(expand(beside.train or id)[:1], images.label))
    whose = whose_logits(detection.logits, loaded, named_classes)
    at_head = at_classifier(model, loaded) if whose == "host" else whose == "probe" or at_embedding(model)
    tokens = token_site(model.sites[IMAGE])  # which are not held: what else is to read them does so in the same pass
    fresh = random_control(model, seed)
    others = {RANDOM: fresh} if RANDOM in detection.controls and tokens else {}
    shards = OODShards(id, ood_shards, val_shards, beside, images, named.values if named else None)
    if run.progress:
        said = f"{len(detection.scores)} detectors, controls {', '.join(detection.controls)}"
        print(f"ood: {len(ood_shards)} sets against {id}; {said}")
    sets = load_sets(loaded, model, shards, run, embed=not at_head, pool=detection.pool, others=others)
    if not tokens:
        fresh = random_control(model, seed, {IMAGE: sets.train.x})

    def class_embeddings():
        names = [named.names[named.values.index(v)] for v in sets.train.values]
        return text_classes(loaded, names, read_templates(texts.templates))

    heads, of_controls = classifiers(whose, model, loaded, fresh, class_embeddings)
    again = (lambda _, f: f.through(f.others[RANDOM])) if tokens else None
    read = replace(detection, features=(*detection.features, *([EMBED] if EMBED in heads else [])))
    say = (lambda said: print(f"ood: {said}", flush=True)) if run.progress else lambda said: None
    fit = FitImages(sets.train, sets.val, sets.val_ood, heads)
    scored = ood_head(fit, sets.test, sets.ood, read, sae=model, near=near, random=again, heads=of_controls, seed=seed,
                      say=say)  # fmt: skip
    warnings = other_host_warnings(trained, loaded) + set_warnings(sets, bool(val_shards)) + edge_warning(scored.edges)
    warnings += without_rows(model) if others else []
    training = sae_training(sae) if isinstance(sae, str) else {}
    about = {
        "head": "ood", "sae": str(sae), "sae_training": training, "site": str(model.sites[IMAGE]),
        "host": loaded.hint, "id": id, "ood": ood_shards, "near": near, "train": beside.train, "val": beside.val,
        "label": images.label, "ood_validation": sets.val_ood_is, "classes": sets.train.names, "pool": sets.test.pool,
        "seed": seed, "logits": logits_of(read.features, heads, len(sets.train.names)),
        "fitted_on": fitted_on(detection.scores, sets.train.n, training),
        "images": {name: f.n for name, f in sets.by_name().items()}, "chosen": scored.chosen,
        "notes": [*sets.notes, *scored.notes], "warnings": warnings,
    }  # fmt: skip
    folder = write_ood(out, scored, about, list(ood_shards))
    if run.progress:
        print("\n".join([*(f"warning: {w}" for w in warnings), markdown(scored.rows, list(ood_shards))]))
    return {"rows": scored.rows, "notes": about["notes"], "warnings": warnings, "out": str(folder)}
