"""``mmsae zeroshot``: classify images by the names of classes, with the host alone and through an SAE."""

from __future__ import annotations

from typing import Any

from mmsae.evaluation.options import ALPHAS, RANDOM, ClassTexts, EvaluationRun, Labelled

TUNE_SHARE = 0.2


def zeroshot(
    sae: str,
    shards: str | list[str],
    out: str,
    host: str = "",
    tune: str | list[str] = "",
    concept: str = "code",
    alphas: list[float] = list(ALPHAS),  # noqa: B006  the help shows it; it is not changed
    control: bool = True,
    seed: int = 0,
    images: Labelled = Labelled(),
    texts: ClassTexts = ClassTexts(),
    run: EvaluationRun = EvaluationRun(),
) -> dict[str, Any]:
    """Zero-shot classification: raw embeddings, reconstructions, codes, and embeddings enhanced by codes.

    Args:
        sae: SAE folder or hub id. One at the embeddings of images and texts has all four; one elsewhere in the image
            tower has ``recon``: the host goes on from the reconstruction.
        shards: Labelled images.
        out: Folder to write.
        host: Host by name, with a text encoder; default: the one that the SAE's site names.
        tune: Labelled images on which alpha is chosen; default: a fifth of ``shards`` by a hash of the uid, which is
            then not scored.
        concept: What enhances: ``code`` or ``recon``.
        alphas: Weights that are tried; 0 is plain CLIP.
        control: Whether to run an SAE of equal size with random weights, too.
        seed: Seed of the random SAE and of the bootstrap.
        images: Which of the images.
        texts: Names and templates.
        run: How to compute.

    Returns:
        ``rows``, ``warnings``, and the folder as ``out``.

    Raises:
        InputError: Names and labels that do not fit, one class only, no image, or a host without texts.
    """
    from mmsae.evaluation.labels import named_classes, read_labels, read_templates
    from mmsae.evaluation.rows import row
    from mmsae.evaluation.zeroshot.classify import Classifier, class_warnings, refuse_unknown
    from mmsae.evaluation.zeroshot.head import text_classes, zero_shot_head
    from mmsae.evaluation.zeroshot.report import write_zeroshot
    from mmsae.load import load_pair, other_host_warnings
    from mmsae.metrics.choice import edge_warning
    from mmsae.sae import SAE, random_control
    from mmsae.sae.random_control import without_rows
    from mmsae.shards import draw, expand
    from mmsae.types import IMAGE

    trained = SAE.from_pretrained(sae) if isinstance(sae, str) else sae
    model, loaded = load_pair(trained, host, run.device, run.precision, run.allow_other_site)
    paths = expand(shards)
    known = read_labels(paths, images.label)
    named = named_classes(texts.classes, known, paths)
    tune_known = read_labels(expand(tune), images.label) if tune else known
    for labels in (known, tune_known):
        refuse_unknown(labels, named)
    prompts = read_templates(texts.templates)
    if run.progress:
        print(f"zeroshot: {len(named.names)} classes, {len(prompts)} templates, {len(paths)} shards")
    classifier = Classifier(loaded, named, text_classes(loaded, named.names, prompts), images, run)
    saes = {"": model, **({RANDOM: random_control(model, seed)} if control else {})}
    held = {u for u in known.value if not tune and draw(u, 6) < TUNE_SHARE}
    test_uids = known.labelled() - held
    tune_uids = tune_known.labelled() if tune else known.labelled() & held
    test_of, explained = classifier.scores(saes, paths, test_uids, "test")
    tune_of, _ = classifier.scores(saes, tune or paths, tune_uids, "tuning")
    warnings = other_host_warnings(trained, loaded) + class_warnings(named, test_of[""].labels, texts.classes)
    warnings += without_rows(model) if control else []
    if bare := len(known.value) - len(known.labelled()):
        warnings.append(f"{bare} of the {len(known.value)} images have no label and are left out")
    if same := len(test_uids & tune_uids):
        warnings.append(f"{same} of the {len(test_uids)} test images are tuning images, too: alpha has seen them")
    found, rows = {}, []
    for name in saes:
        found[name] = zero_shot_head(
            test_of[name], tune_of[name], concept=concept, alphas=alphas, control=name, seed=seed
        )
        rows += found[name].rows
        n = len(test_of[name].labels)
        rows.append(row("zeroshot", "test", "explained_variance", "recon", explained[name], n, name))
    warnings += edge_warning([e for f in found.values() for e in f.edges])
    main = found[""]
    about = {
        "head": "zeroshot", "sae": str(sae), "site": str(model.sites[IMAGE]), "host": loaded.hint,
        "shards": shards, "tune": tune or f"{TUNE_SHARE:.0%} of the shards, by uid", "label": images.label,
        "classes": named.names, "templates": prompts, "images": {"test": len(test_of[""].labels),
        "tuning": len(tune_of[""].labels)}, "chance": 1 / len(named.names), "concept": concept,
        "alpha": main.alpha, "tuning": main.tuning, "warnings": warnings,
    }  # fmt: skip
    folder = write_zeroshot(out, rows, main, named.names, about, run.progress)
    return {"rows": rows, "warnings": warnings, "out": str(folder)}
