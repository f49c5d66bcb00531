"""``mmsae chair``: objects that captions of a model invent, several ways of decoding side by side."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from mmsae.files import atomic_file
from mmsae.lvlm.decoding.concept import PRESETS, Settings
from mmsae.lvlm.hallucination.answers import Prompt, ask_all, at_least_one, probe_batches, same_job, set_up
from mmsae.lvlm.hallucination.questions import TEMPLATE, build_pope, names_of, read_objects
from mmsae.metrics.host.chair import Objects, chair, hallucinated
from mmsae.shards import FAULT_LIMIT, FaultLog, expand, identity, read_shards
from mmsae.types import InputError

PROMPT = "Please describe this image in detail."


def chair_command(
    host: str,
    shards: str | list[str],
    out: str,
    synonyms: str | None = None,
    sae: str | None = None,
    aligner: str | None = None,
    methods: list[str] = ["greedy"],  # noqa: B006  jsonargparse shows it in the help; it is not changed
    settings: Settings = PRESETS["chair"],
    site: str | None = None,
    allow_other_site: bool = False,
    token_sae: str | None = None,
    probe: str | list[str] | None = None,
    gamma: float = 0.2,
    prompt: str = PROMPT,
    question: str = TEMPLATE,
    images: int = 500,
    object_field: str = "objects",
    object_names: list[str] = [],  # noqa: B006
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    fault_limit: float = FAULT_LIMIT,
    progress: bool = True,
) -> dict[str, Any]:
    """CHAIR with any model, any labelled pictures, and several ways of decoding.

    Args:
        host: Vision-language model, ``lvlm:FOLDER`` or ``lvlm:HUB_ID``.
        shards: Pictures with objects in their json; reference captions (``captions``, or the caption) count too.
        out: Folder to write.
        synonyms: File with one object a line, its name and synonyms separated by commas; default: the names that the
            shards use, without synonyms.
        sae: SAE of pooled image and text states, for ``concept``.
        aligner: Folder or published file of its aligner.
        methods: ``greedy`` (always), ``sample``, ``concept`` (with its control ``beta``), ``ssl``, ``save``.
        settings: Of concept decoding; the default is published for LLaVA-1.5.
        site: Where concept decoding edits (``layers.30:out``); default: the SAE's site.
        allow_other_site: Accept another site than the SAE's.
        token_sae: SAE on tokens, for ``ssl`` and ``save``.
        probe: Other labelled shards, on which their directions are found.
        gamma: Strength of these directions, in norms of the state.
        prompt: What the model is told.
        question: Of the yes/no questions by which directions are found.
        images: Number of pictures, the first ones by uid.
        object_field: Field of json that lists the objects.
        object_names: Fields that make an object's name where objects are dicts, e.g. [colour, shape].
        batch_size: Pictures per batch.
        seed: Of sampling.
        device: ``cpu``, ``cuda`` or ``auto``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        fault_limit: Largest share of samples that may be unusable.
        progress: Whether to show bars and print.

    Returns:
        ``{method: figures}`` under ``table``, and the folder as ``out``.
    """
    at_least_one(batch_size=batch_size, images=images)
    folder = Path(out)
    annotated, references = {}, {}
    for s in read_shards(expand(shards), FaultLog(), need=(), decode=False):
        if object_field in s.meta:
            annotated[s.uid] = names_of(s.meta[object_field], object_names)
            references[s.uid] = s.meta.get("captions") or [s.caption]
    if not annotated:
        raise InputError(f"no sample of {shards} has the json field {object_field!r}, which names its objects")
    names = sorted({n for own in annotated.values() for n in own})
    objects = Objects.read(synonyms) if synonyms else Objects.of(([n] for n in names), published=False)
    chosen = set(sorted(annotated)[:images])
    truth = {i: objects.truth(annotated[i], references[i]) for i in chosen}

    def probed(model):
        own = build_pope(read_objects(probe, object_field, object_names), "random", 100, 3, 1, seed, question)
        return probe_batches(model, probe, own, "{question}", batch_size), [q.label for q in own]

    setup = set_up(
        host, methods, settings, sae, aligner, site, allow_other_site, probed if probe else None, token_sae, gamma,
        device, precision,
    )  # fmt: skip
    job = {**setup.about, "prompt": prompt, "images": sorted(chosen), "seed": seed, "batch_size": batch_size}
    job |= {"shards": identity(expand(shards))}
    with same_job(folder, job):
        captions = ask_all(
            setup.host, setup.methods, shards, lambda s: [Prompt(s.uid, prompt)] * (s.uid in chosen), folder / "parts",
            batch_size, seed, fault_limit, progress,
        )  # fmt: skip
    table = {m: chair(c, truth, objects)._asdict() for m, c in captions.items()}
    wrong = partial(hallucinated, objects=objects)
    details = {
        m: {i: {"caption": c, "hallucinated": wrong(c, truth[i])} for i, c in own.items()}
        for m, own in captions.items()
    }
    results = {"table": table, **setup.about}
    for name, content in (("captions.json", details), ("results.json", results)):
        with atomic_file(folder / name) as temp:
            temp.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    from mmsae.lvlm.hallucination.report import chair_table, plot_chair

    plot_chair(table, folder / "chair.png")
    if progress:
        print(chair_table(table))
    return {**results, "out": str(folder)}
