"""Answers of several methods to questions about images: what ``mmsae pope`` and ``mmsae chair`` share.

They are made tar by tar, one part file each, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmsae.hosts import Answers, load_host, pick_device
from mmsae.jobs import JobFolder
from mmsae.jobs.units import Engine, Share, Work, do_missing
from mmsae.load import load_pair, load_unchecked
from mmsae.lvlm.decoding.concept import ConceptDecoder
from mmsae.lvlm.decoding.directions import TokenEdit, find_latents, save_edit, ssl_edit, unit_direction
from mmsae.lvlm.decoding.settings import Settings
from mmsae.lvlm.hallucination.questions import Question
from mmsae.lvlm.options import Answering
from mmsae.lvlm.tokens import TokenScorer
from mmsae.options import OneProcessRun
from mmsae.sae import SAE
from mmsae.sae.aligner import Aligner
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FaultLog, Sample, expand, identity, place, read_shard, read_shards, taken, tried
from mmsae.types import TEXT, Codes, Faults, ImageTextBatch, InputError

METHODS = ("greedy", "sample", "beta", "concept", "ssl", "save")
Answer = Callable[[ImageTextBatch], list[str]]


class Prompt(NamedTuple):
    """One thing to ask about an image."""

    id: str  #: Name, unique in the run.
    text: str  #: What the user says.


class AnsweringHost(NamedTuple):
    """A host with the ways in which it answers."""

    host: Answers  #: The host.
    methods: dict[str, Answer]  #: ``{name: batch -> answers}``, see :func:`make_methods`.


def prepare(
    host: str,
    answering: Answering,
    run: OneProcessRun,
    prompt: str,
    probe: Callable[[], list[Question]],
    rank: int = 0,
) -> tuple[AnsweringHost, dict[str, Any]]:
    """Load host and SAEs, find directions where they are asked for, and make the methods.

    ``probe`` gives questions about ``answering.probe`` by which directions are found; ``prompt`` stands around them;
    ``rank`` is the number of the process, which chooses its device. Returned are the host with its methods, and plain
    values that decide the answers.
    """
    settings, methods = answering.settings, answering.methods
    settings.check()
    device = pick_device(run.device, rank)
    loaded = load_host(host, device=device, precision=run.precision)
    if not isinstance(loaded, Answers):
        raise InputError(f"host {host} answers no questions: a vision-language model is needed (lvlm:...)")
    about: dict[str, Any] = {"host": loaded.fingerprint, "settings": settings._asdict(), "methods": list(methods)}
    decoder, edits = None, {}
    if answering.sae is not None:
        model, _ = load_unchecked(answering.sae, loaded)
        maps = None if answering.aligner is None else Aligner.from_pretrained(answering.aligner, device)
        about |= {"sae": sae_fingerprint(model), "aligner": answering.aligner, "site": answering.site}
        decoder = lambda s: ConceptDecoder(loaded, model, maps, s, answering.site, run.allow_other_site)  # noqa: E731
    if {"ssl", "save"} & set(methods):
        if answering.token_sae is None or answering.probe is None:
            raise InputError("methods ssl and save need --token-sae, an SAE on tokens, and --probe, labelled shards")
        tokens, _ = load_pair(answering.token_sae, loaded, allow_other_site=run.allow_other_site)
        asked = probe()
        batches = probe_batches(loaded, answering.probe, asked, prompt, run.batch_size)
        edits, found = find_directions(loaded, tokens, batches, [q.label for q in asked], answering.gamma)
        about |= {"token_sae": sae_fingerprint(tokens), "gamma": answering.gamma, **found}
    return AnsweringHost(loaded, make_methods(methods, loaded, settings, decoder, edits)), about


def find_directions(
    host: Answers, sae: SAE, batches: Iterable[ImageTextBatch], labels: Sequence[str], gamma: float
) -> tuple[dict[str, tuple[str, TokenEdit]], dict[str, Any]]:
    """SSL and SAVE edits with their site, from questions whose answers are known; and what was found."""
    scorer = TokenScorer(host, sae)
    text, answers = [], []
    for batch in batches:
        text.append(scorer.pooled(batch)[TEXT])
        answers += host.answer(batch, max_new_tokens=8)
    codes = Codes.stack(text)
    right = torch.tensor([a.lower().startswith(label) for a, label in zip(answers, labels, strict=True)])
    many, one = find_latents(codes, right), find_latents(codes, right, 1)
    ssl, save = ([unit_direction(sae, ids) for ids in found[:2]] for found in (one, many))
    site = next(iter(scorer.sites.values()))
    at = f"{site.module}:{site.io}"
    about = {"faithful": many.faithful.tolist(), "hallucination": many.hallucination.tolist(), "probed": many.answers}
    return {"ssl": (at, ssl_edit(*ssl, gamma)), "save": (at, save_edit(*save, gamma))}, about


def probe_batches(
    host: Answers, shards: Any, questions: Sequence[Question], prompt: str, batch_size: int
) -> Iterator[ImageTextBatch]:
    """Batches of questions in their order, for finding directions."""
    wanted, log = {q.image for q in questions}, FaultLog()
    images = {s.uid: s.image for s in read_shards(expand(shards), log, need=("image",)) if s.uid in wanted}
    if lost := sorted(wanted - set(images)):
        raise InputError(f"{len(lost)} of {len(wanted)} images of the probe {shards} cannot be read, {lost[0]} say")
    for i in range(0, len(questions), batch_size):
        part = questions[i : i + batch_size]
        make = lambda qs: host.collate.batch(  # noqa: E731
            [prompt.replace("{question}", q.text) for q in qs], [images[q.image] for q in qs]
        )
        batch, _ = tried(make, part, log, lambda q: (str(shards), q.image))
        if batch is None:
            raise InputError(f"a question of the probe cannot be asked: {log.summary().splitlines()[-1].strip()}")
        yield batch


def steered(host: Answers, site: str, edit: TokenEdit) -> AbstractContextManager[None]:
    """While the context is open, the edit holds at all tokens of a module (``layers.2:out``), decoding included.

    What is done to image tokens after the last block reaches nothing: no block reads them there.
    """
    return host.edit(f"{site.partition('[')[0]}[all]", edit, where=True)


def make_methods(
    names: Sequence[str],
    host: Answers,
    settings: Settings,
    decoder: Callable[[Settings], ConceptDecoder] | None = None,
    edits: Mapping[str, tuple[str, TokenEdit]] | None = None,
) -> dict[str, Answer]:
    """``{name: batch -> answers}`` of some of ``METHODS``.

    ``greedy`` and ``sample`` are the model alone; ``concept`` is concept decoding, and with it always comes ``beta``,
    the same cut without concepts, which it has to beat. Length, temperature and sampling of the settings hold for all
    but ``greedy``. ``decoder`` is needed for ``concept`` and ``beta``; ``edits`` are ``{"ssl": (site, edit), "save":
    (site, edit)}``, decoded as ``greedy``.

    Raises:
        InputError: An unknown method, or one that lacks what it needs.
    """
    wanted = list(dict.fromkeys(["greedy", *names, *(["beta"] if "concept" in names else [])]))
    greedy = {"do_sample": False, "max_new_tokens": settings.max_new_tokens}
    out: dict[str, Answer] = {}
    for name in sorted(wanted, key=lambda n: METHODS.index(n) if n in METHODS else -1):
        if name == "greedy":
            out[name] = lambda batch: host.answer(batch, **greedy)
        elif name == "sample":
            out[name] = lambda batch: host.answer(batch, **{**settings.generation(), "do_sample": True})
        elif name in ("beta", "concept"):
            if decoder is None:
                raise InputError("methods concept and beta need an SAE of image and text states: give --sae")
            out[name] = decoder(settings if name == "concept" else settings.control()).answer
        elif name in ("ssl", "save"):
            if name not in (edits or {}):
                raise InputError(f"method {name} needs an SAE on tokens and shards to find directions on: give --probe")
            out[name] = _edited(host, *edits[name], greedy)
        else:
            raise InputError(f"method {name!r} is not one of {', '.join(METHODS)}")
    return out


def _edited(host: Answers, site: str, edit: TokenEdit, options: dict) -> Answer:
    def answer(batch: ImageTextBatch) -> list[str]:
        with steered(host, site, edit):
            return host.answer(batch, **options)

    return answer


class AskJob:
    """Questions about the samples of shards, with parts in ``out``.

    ``prompts`` says what to ask about a sample, nothing for most. Every tar and method begins with the ``seed`` of
    sampling; ``job`` is what identifies the job beside that, shards and batch size.
    """

    def __init__(
        self,
        ready: AnsweringHost,
        out: str | Path,
        job: dict[str, Any],
        shards: str | Sequence[str],
        prompts: Callable[[Sample], list[Prompt]],
        seed: int,
        run: OneProcessRun,
    ) -> None:
        self.ready, self.prompts, self.seed, self.run, self.shards = ready, prompts, seed, run, shards
        paths = expand(shards)
        job = {**job, "seed": seed, "batch_size": run.batch_size, "shards": identity(paths)}
        self.folder = JobFolder(out, job, "mmsae pope or chair")
        self.parts = self.folder.parts(paths)

    def work(self, share: Share) -> None:
        """Write the parts of some tars."""
        self.parts.work(self._part, share, "answers", self.run.progress)

    def _part(self, path: str) -> bytes:
        log, asked, size, host = FaultLog(), [], self.run.batch_size, self.ready.host
        for s in read_shard(path, log, need=("image",)):
            asked += [(p, s) for p in self.prompts(s)]
        rows, refused = [], FaultLog(keep=1 << 30)
        for name, answer in self.ready.methods.items():
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                for i in range(0, len(asked), size):
                    part = asked[i : i + size]
                    batch, part = taken(partial(_batch, host), part, refused, lambda row: place(row[1]))
                    if batch is not None:
                        rows += [[name, p.id, a] for (p, _), a in zip(part, answer(batch), strict=True)]
        for one in {e[:3]: e for e in refused.take().examples}.values():  # each prompt of each method met it
            log.add(*one)
        return json.dumps({"rows": rows, "faults": log.take()}).encode()

    def answers(self, fault_limit: float) -> dict[str, dict[str, str]]:
        """``{method: {prompt id: answer}}`` of all parts."""
        log, answers = FaultLog(), {}
        for part in self.parts.files():
            content = json.loads(part.read_text())
            log.merge(Faults.read(content["faults"]))
            for name, prompt, answer in content["rows"]:
                answers.setdefault(name, {})[prompt] = answer
        log.check(fault_limit, final=True)
        if not answers:
            raise InputError(f"none of the questions is about a sample of {self.shards}")
        return answers


def ask_all(
    job: AskJob, fault_limit: float, engine: Engine, there: Callable[..., Work], *given: Any
) -> dict[str, dict[str, str]]:
    """``{method: {prompt id: answer}}``; ``there`` and ``given`` as :meth:`~mmsae.jobs.units.Engine.run` takes them."""
    engine.decoders(job.run.workers)
    found: dict[str, dict[str, str]] = {}
    with job.folder.under(engine):
        do_missing(engine, job.parts.tally, job.work, there, *given)
        engine.merge(lambda: False, lambda: found.update(job.answers(fault_limit)))
    return found


def _batch(host: Answers, asked: Sequence[tuple[Prompt, Sample]]) -> ImageTextBatch:
    return host.collate.batch([p.text for p, _ in asked], [s.image for _, s in asked], uids=[s.uid for _, s in asked])
