"""``mmsae pope``: does the model see what it says? Yes/no questions, several ways of answering side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmsae.files import atomic_file
from mmsae.hosts.lvlm.host import LVLMHost
from mmsae.lvlm.decoding.concept import PRESETS, Settings
from mmsae.lvlm.hallucination.answers import Prompt, ask_all, at_least_one, probe_batches, same_job, set_up
from mmsae.lvlm.hallucination.questions import (
    STRATEGIES,
    TEMPLATE,
    Question,
    build_pope,
    load_questions,
    read_objects,
    save_questions,
)
from mmsae.metrics.host.hallucination import PARSERS, score_answers
from mmsae.shards import FAULT_LIMIT, FaultLog, Sample, expand, identity, read_shards
from mmsae.types import InputError


def pope(
    host: str,
    shards: str | list[str],
    out: str,
    sae: str | None = None,
    aligner: str | None = None,
    methods: list[str] = ["greedy"],  # noqa: B006  jsonargparse shows it in the help; it is not changed
    questions: str | None = None,
    strategies: list[str] = list(STRATEGIES),  # noqa: B006
    settings: Settings = PRESETS["pope"],
    site: str | None = None,
    allow_other_site: bool = False,
    token_sae: str | None = None,
    probe: str | list[str] | None = None,
    gamma: float = 0.2,
    parser: str = "official",
    images: int = 500,
    per_image: int = 3,
    min_objects: int = 3,
    object_field: str = "objects",
    object_names: list[str] = [],  # noqa: B006
    template: str = TEMPLATE,
    prompt: str = "{question}",
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    fault_limit: float = FAULT_LIMIT,
    progress: bool = True,
) -> dict[str, Any]:
    """POPE with any model, any labelled pictures, and several ways of answering.

    Args:
        host: Vision-language model, ``lvlm:FOLDER`` or ``lvlm:HUB_ID``.
        shards: Pictures with objects in their json.
        out: Folder to write.
        sae: SAE of pooled image and text states, for ``concept``.
        aligner: Folder or published file of its aligner.
        methods: ``greedy`` (always), ``sample``, ``concept`` (with its control ``beta``), ``ssl``, ``save``.
        questions: A file of questions instead of made ones; ``image`` is the sample's uid or key.
        strategies: How absent objects are chosen: random, popular, adversarial.
        settings: Of concept decoding; the default is published for LLaVA-1.5.
        site: Where concept decoding edits (``layers.30:out``); default: the SAE's site.
        allow_other_site: Accept another site than the SAE's.
        token_sae: SAE on tokens, for ``ssl`` and ``save``.
        probe: Other labelled shards, on which their directions are found.
        gamma: Strength of these directions, in norms of the state.
        parser: How answers are read in the picture: official, substring or strict; the results have all three.
        images: Number of pictures.
        per_image: Present objects, and as many absent ones, asked for in each.
        min_objects: Objects that a picture must have.
        object_field: Field of json that lists them.
        object_names: Fields that make an object's name where objects are dicts, e.g. [colour, shape].
        template: Of questions.
        prompt: Around a question, e.g. "{question} Please answer this question with one word."
        batch_size: Questions per batch.
        seed: Of questions and sampling.
        device: ``cpu``, ``cuda`` or ``auto``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        fault_limit: Largest share of samples that may be unusable.
        progress: Whether to show bars and print.

    Returns:
        ``{strategy: {method: {parser: figures}}}`` under ``table``, and the folder as ``out``.
    """
    folder = Path(out)
    if parser not in PARSERS:
        raise InputError(f"parser {parser!r} is not one of {', '.join(PARSERS)}")
    at_least_one(batch_size=batch_size, images=images, per_image=per_image)
    if "{question}" not in prompt:
        raise InputError(f"prompt {prompt!r} has no {{question}} in it, so nothing would be asked")
    build = partial(build_pope, per_image=per_image, min_objects=min_objects, seed=seed, template=template)
    read = partial(read_objects, field=object_field, fields=object_names)
    if questions is None:
        objects = read(shards)
        sets = {s: build(objects, s, images) for s in strategies}
    else:
        sets = {Path(questions).stem: load_questions(questions)}
        check_pictures(sets, shards)

    def probed(model: LVLMHost):
        own = build(read(probe), "random", min(images, 100))
        return probe_batches(model, probe, own, prompt, batch_size), [q.label for q in own]

    setup = set_up(
        host, methods, settings, sae, aligner, site, allow_other_site, probed if probe else None, token_sae, gamma,
        device, precision,
    )  # fmt: skip
    job = {
        **setup.about,
        "questions": {s: [list(q) for q in qs] for s, qs in sets.items()},
        "prompt": prompt,
        "seed": seed,
        "batch_size": batch_size,
        "shards": identity(expand(shards)),
    }
    with same_job(folder, job):
        for s, qs in sets.items():
            save_questions(qs, folder / f"questions_{s}.json")
        about = _by_image(sets)
        found = ask_all(
            setup.host, setup.methods, shards, lambda s: _prompts(s, about, prompt), folder / "parts", batch_size, seed,
            fault_limit, progress,
        )  # fmt: skip
    table = {s: score_methods(found, qs, s) for s, qs in sets.items()}
    if not any(found["greedy"]):
        raise InputError(f"none of the questions is about a sample of {shards}")
    results = {"table": table, **setup.about, "parser": parser}
    with atomic_file(folder / "answers.json") as temp:
        temp.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    with atomic_file(folder / "results.json") as temp:
        temp.write_text(json.dumps(results, indent=2) + "\n")
    from mmsae.lvlm.hallucination.report import plot_pope, pope_table

    plot_pope(table, folder / "pope.png", parser)
    if progress:
        print(pope_table(table, parser))
    return {**results, "out": str(folder)}


def _by_image(sets: Mapping[str, Sequence[Question]]) -> dict[str, list[tuple[str, Question]]]:
    out: dict[str, list[tuple[str, Question]]] = {}
    for strategy, questions in sets.items():
        for q in questions:
            out.setdefault(q.image, []).append((strategy, q))
    return out


def check_pictures(sets: Mapping[str, Sequence[Question]], shards: str | Sequence[str]) -> None:
    """Refuse questions about a key that several samples have: they would be asked about one and scored for another.

    Raises:
        InputError: Names the key and two of its shards.
    """
    asked, at = {q.image for questions in sets.values() for q in questions}, {}
    for s in read_shards(expand(shards), FaultLog(), need=(), decode=False):
        for image in {s.uid, s.key} & asked:
            if first := at.get(image):
                raise InputError(
                    f"questions are about {image}, which is a sample of {first} and one of {s.shard}: name their uids"
                )
            at[image] = s.shard


def _prompts(sample: Sample, about: Mapping[str, list[tuple[str, Question]]], prompt: str) -> list[Prompt]:
    own = [*about.get(sample.uid, []), *about.get(sample.key, [])]
    return [Prompt(f"{s}/{q.question_id}", prompt.replace("{question}", q.text)) for s, q in own]


def score_methods(
    found: Mapping[str, Mapping[str, str]], questions: Sequence[Question], strategy: str
) -> dict[str, dict[str, dict[str, float]]]:
    """``{method: {parser: figures}}`` of the questions that were answered (their pictures are in the shards)."""
    out = {}
    for method, answers in found.items():
        own = [(answers[i], q.label) for q in questions if (i := f"{strategy}/{q.question_id}") in answers]
        if own:
            said, labels = zip(*own, strict=True)
            out[method] = {p: score_answers(said, labels, p)._asdict() for p in PARSERS}
    return out
