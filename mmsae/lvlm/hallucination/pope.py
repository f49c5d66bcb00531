"""``mmsae pope``: does the model see what it says? Yes/no questions, several ways of answering side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmsae.errors import InputError
from mmsae.lvlm.options import STRATEGIES, TEMPLATE, Answering, ImageLabels
from mmsae.options import OneProcessRun, Shards, Spread, at_least


@dataclass(frozen=True)
class Asking:
    """Questions that are asked."""

    questions: str | None = None
    """File of questions instead of made ones; its ``image`` is the sample's uid or key."""
    strategies: tuple[str, ...] = STRATEGIES
    """How absent objects are chosen: random, popular, adversarial."""
    per_image: int = 3
    """Present objects, and as many absent ones, asked for in each image."""
    min_objects: int = 3
    """Objects that an image must have."""
    template: str = TEMPLATE
    """Wording of a question."""
    prompt: str = "{question}"
    """What stands around a question, e.g. "{question} Please answer this question with one word."."""
    parser: str = "official"
    """How answers are read in the figure: official, substring or strict; the results have all three."""


def pope(
    host: str,
    shards: str | list[str],
    out: str,
    seed: int = 0,
    asking: Asking = Asking(),
    answering: Answering = Answering(),
    labels: ImageLabels = ImageLabels(),
    run: OneProcessRun = OneProcessRun(batch_size=8),
    data: Shards = Shards(),
    spread: Spread = Spread(),
) -> dict[str, Any] | None:
    """POPE with any model, any labelled images, and several ways of answering.

    Args:
        host: Vision-language model, ``lvlm:FOLDER`` or ``lvlm:HUB_ID``.
        shards: Images with objects in their json.
        out: Folder to write.
        seed: Seed of the questions and of sampling.
        asking: Questions that are asked.
        answering: Ways of answering that are compared.
        labels: Objects of the images.
        run: Device, precision and batch size, and what is said.
        data: What is made of the samples' files.
        spread: Who does the work.

    Returns:
        ``{strategy: {method: {parser: figures}}}`` under ``table``, and the folder as ``out``; None where other parts
        of the job have to go on.
    """
    from mmsae.files import write_json
    from mmsae.jobs.engines import engine_of
    from mmsae.lvlm.hallucination.answers import ask_all
    from mmsae.lvlm.hallucination.questions import save_questions, score_methods
    from mmsae.lvlm.hallucination.report import plot_pope, pope_table
    from mmsae.metrics.host.hallucination import PARSERS

    folder = Path(out)
    if asking.parser not in PARSERS:
        raise InputError(f"parser {asking.parser!r} is not one of {', '.join(PARSERS)}")
    at_least(1, batch_size=run.batch_size, images=labels.images, per_image=asking.per_image)
    if "{question}" not in asking.prompt:
        raise InputError(f"prompt {asking.prompt!r} has no {{question}} in it, so nothing would be asked")
    with engine_of(spread, run) as engine:
        given = (host, shards, out, seed, asking, answering, labels, run)
        job, sets, about = _prepared(engine.rank, *given)
        answers = ask_all(job, data.fault_limit, engine, _elsewhere, *given)
        table = {s: score_methods(answers, qs, s) for s, qs in sets.items()}
        results = {"table": table, **about, "parser": asking.parser}
        for s, qs in sets.items():
            save_questions(qs, folder / f"questions_{s}.json")
        write_json(folder / "answers.json", answers, indent=1)
        write_json(folder / "results.json", results)
        plot_pope(table, folder / "pope.png", asking.parser)
        if run.progress:
            print(pope_table(table, asking.parser))
        return {**results, "out": str(folder)}
    return None


def _elsewhere(rank: int, *given: Any) -> Any:
    """What does a process's tars, in a process that has loaded nothing."""
    return _prepared(rank, *given)[0].work


def _prepared(
    rank: int,
    host: str,
    shards: str | list[str],
    out: str,
    seed: int,
    asking: Asking,
    answering: Answering,
    labels: ImageLabels,
    run: OneProcessRun,
) -> tuple[Any, dict[str, list], dict[str, Any]]:
    """The job (AskJob) on the device of a process, the questions by strategy, and what decides the answers."""
    from mmsae.lvlm.hallucination.answers import AskJob, Prompt, prepare
    from mmsae.lvlm.hallucination.questions import build_pope, by_image, check_images, load_questions, read_objects

    prompt = asking.prompt

    def build(images: Any, strategy: str, most: int) -> list:
        return build_pope(
            read_objects(images, labels), strategy, most, asking.per_image, asking.min_objects, seed, asking.template
        )

    if asking.questions is None:
        sets = {s: build(shards, s, labels.images) for s in asking.strategies}
    else:
        sets = {Path(asking.questions).stem: load_questions(asking.questions)}
        check_images(sets, shards)
    most = min(labels.images, 100)
    ready, about = prepare(host, answering, run, prompt, lambda: build(answering.probe, "random", most), rank)
    job = {**about, "questions": {s: [list(q) for q in qs] for s, qs in sets.items()}, "prompt": prompt}
    of_image = by_image(sets)

    def prompts(s: Any) -> list[Prompt]:
        asked = [*of_image.get(s.uid, []), *of_image.get(s.key, [])]
        return [Prompt(f"{strategy}/{q.question_id}", prompt.replace("{question}", q.text)) for strategy, q in asked]

    return AskJob(ready, out, job, shards, prompts, seed, run), sets, about
