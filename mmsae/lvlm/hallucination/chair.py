"""``mmsae chair``: objects that captions of a model invent, several ways of decoding side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmsae.lvlm.decoding.settings import PRESETS
from mmsae.lvlm.options import TEMPLATE, Answering, ImageLabels
from mmsae.options import OneProcessRun, Shards, Spread, at_least

PROMPT = "Please describe this image in detail."


def chair_command(
    host: str,
    shards: str | list[str],
    out: str,
    synonyms: str | None = None,
    prompt: str = PROMPT,
    question: str = TEMPLATE,
    seed: int = 0,
    answering: Answering = Answering(settings=PRESETS["chair"]),
    labels: ImageLabels = ImageLabels(),
    run: OneProcessRun = OneProcessRun(batch_size=8),
    data: Shards = Shards(),
    spread: Spread = Spread(),
) -> dict[str, Any] | None:
    """CHAIR with any model, any labelled images, and several ways of decoding.

    Args:
        host: Vision-language model, ``lvlm:FOLDER`` or ``lvlm:HUB_ID``.
        shards: Images with objects in their json; reference captions (``captions``, or the caption) count too. The
            first ones by uid are captioned.
        out: Folder to write.
        synonyms: File with one object a line, its name and synonyms separated by commas; default: the names that the
            shards use, without synonyms.
        prompt: What the model is told.
        question: Wording of the yes/no questions by which directions are found.
        seed: Seed of sampling.
        answering: Ways of answering that are compared.
        labels: Objects of the images.
        run: Device, precision and batch size, and what is said.
        data: What is made of the samples' files.
        spread: Who does the work.

    Returns:
        ``{method: figures}`` under ``table``, and the folder as ``out``; None where other parts of the job have to go
        on.
    """
    from mmsae.files import write_json
    from mmsae.jobs.engines import engine_of
    from mmsae.lvlm.hallucination.answers import ask_all
    from mmsae.lvlm.hallucination.report import chair_table, plot_chair
    from mmsae.metrics.host.chair import chair, hallucinated

    at_least(1, batch_size=run.batch_size, images=labels.images)
    with engine_of(spread, run) as engine:
        given = (host, shards, out, synonyms, prompt, question, seed, answering, labels, run)
        job, truth, objects, about = _prepared(engine.rank, *given)
        captions = ask_all(job, data.fault_limit, engine, _elsewhere, *given)
        table = {m: chair(c, truth, objects)._asdict() for m, c in captions.items()}
        details = {
            m: {i: {"caption": c, "hallucinated": hallucinated(c, truth[i], objects)} for i, c in own.items()}
            for m, own in captions.items()
        }
        folder, results = Path(out), {"table": table, **about}
        write_json(folder / "captions.json", details, indent=1)
        write_json(folder / "results.json", results, indent=1)
        plot_chair(table, folder / "chair.png")
        if run.progress:
            print(chair_table(table))
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
    synonyms: str | None,
    prompt: str,
    question: str,
    seed: int,
    answering: Answering,
    labels: ImageLabels,
    run: OneProcessRun,
) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """The job (AskJob) of a process, the images' objects, how they are found, and what decides the captions."""
    from mmsae.lvlm.hallucination.answers import AskJob, Prompt, prepare
    from mmsae.lvlm.hallucination.questions import build_pope, read_labels, read_objects
    from mmsae.metrics.host.chair import Objects

    known = read_labels(shards, labels)
    names = sorted({n for own, _ in known.values() for n in own})
    objects = Objects.read(synonyms) if synonyms else Objects.of(([n] for n in names), published=False)
    truth = {i: objects.truth(*known[i]) for i in sorted(known)[: labels.images]}

    def probe() -> list:
        return build_pope(read_objects(answering.probe, labels), "random", 100, 3, 1, seed, question)

    ready, about = prepare(host, answering, run, "{question}", probe, rank)
    job = {**about, "prompt": prompt, "images": list(truth)}
    prompts = lambda s: [Prompt(s.uid, prompt)] * (s.uid in truth)  # noqa: E731
    return AskJob(ready, out, job, shards, prompts, seed, run), truth, objects, about
