"""Answers of several methods to questions about pictures: what ``mmsae pope`` and ``mmsae chair`` share.

They are made tar by tar, one part file each, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmsae.files import atomic_file
from mmsae.hosts import load_host, pick_device
from mmsae.hosts.lvlm.host import LVLMHost
from mmsae.jobs import Parts
from mmsae.lvlm.decoding.concept import ConceptDecoder, Settings
from mmsae.lvlm.decoding.methods import (
    Answer,
    find_latents,
    make_methods,
    save_edit,
    ssl_edit,
    unit_direction,
)
from mmsae.lvlm.hallucination.questions import Question
from mmsae.lvlm.tokens import TokenScorer
from mmsae.sae import SAE
from mmsae.sae.aligner import Aligner
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FAULT_LIMIT, FaultLog, Sample, expand, place, read_shard, read_shards, taken, tried
from mmsae.types import Faults, ImageTextBatch, InputError


class Prompt(NamedTuple):
    """One thing to ask about a picture.

    Attributes:
        id: Of the prompt, unique in the run.
        text: What the user says.
    """

    id: str
    text: str


def ask_all(
    host: LVLMHost,
    methods: Mapping[str, Answer],
    shards: str | Sequence[str],
    prompts: Callable[[Sample], list[Prompt]],
    out: Path,
    batch_size: int = 8,
    seed: int = 0,
    fault_limit: float = FAULT_LIMIT,
    progress: bool = True,
) -> dict[str, dict[str, str]]:
    """Answers of every method to every prompt.

    Args:
        host: The host.
        methods: See :func:`~mmsae.lvlm.decoding.methods.make_methods`.
        shards: The pictures.
        prompts: What to ask about a sample; nothing for most.
        out: Folder of part files, one per tar.
        batch_size: Prompts per batch.
        seed: Of sampling; every tar and method begins with it.
        fault_limit: Largest share of unusable samples.
        progress: Whether to show a bar.

    Returns:
        ``{method: {prompt id: answer}}``.
    """
    paths = expand(shards)

    def work(path: str) -> bytes:
        log, asked = FaultLog(), []
        for s in read_shard(path, log, need=("image",)):
            asked += [(p, s) for p in prompts(s)]
        rows, refused = [], FaultLog(keep=1 << 30)
        for name, answer in methods.items():
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                for i in range(0, len(asked), batch_size):
                    part = asked[i : i + batch_size]
                    batch, part = taken(partial(_batch, host), part, refused, lambda row: place(row[1]))
                    if batch is not None:
                        rows += [[name, p.id, a] for (p, _), a in zip(part, answer(batch), strict=True)]
        for one in {e[:3]: e for e in refused.take().examples}.values():  # each prompt of each method met it
            log.add(*one)
        return json.dumps({"rows": rows, "faults": log.take()}).encode()

    out.mkdir(parents=True, exist_ok=True)
    log, found = FaultLog(), {m: {} for m in methods}
    for part in Parts(out, paths).run(work, progress=progress, what="answers"):
        content = json.loads(part.read_text())
        seen, counts, examples = content["faults"]
        log.merge(Faults(seen, counts, tuple(map(tuple, examples))))
        for name, prompt, answer in content["rows"]:
            found[name][prompt] = answer
    log.check(fault_limit, final=True)
    return found


def _batch(host: LVLMHost, asked: Sequence[tuple[Prompt, Sample]]) -> ImageTextBatch:
    return host.collate.batch([p.text for p, _ in asked], [s.image for _, s in asked], uids=[s.uid for _, s in asked])


def at_least_one(**given: int) -> None:
    """Refuse counts below 1.

    Raises:
        InputError: Names the first.
    """
    for name, n in given.items():
        if n < 1:
            raise InputError(f"{name} is {n}; it must be at least 1")


class Setup(NamedTuple):
    """What a run of hallucination measures needs.

    Attributes:
        host: The host.
        methods: Ways of answering.
        about: Plain values that decide the answers.
    """

    host: LVLMHost
    methods: dict[str, Answer]
    about: dict[str, Any]


def set_up(
    host: str,
    methods: Sequence[str],
    settings: Settings,
    sae: str | None,
    aligner: str | None,
    site: str | None,
    allow_other_site: bool,
    probe: Callable[[LVLMHost], tuple[Any, list[str]]] | None,
    token_sae: str | None,
    gamma: float,
    device: str,
    precision: str,
) -> Setup:
    """Load host and SAEs, find directions where they are asked for, and make the methods."""
    settings.check()
    device = pick_device(device)
    loaded = load_host(host, device=device, precision=precision)
    if not isinstance(loaded, LVLMHost):
        raise InputError(f"host {host} answers no questions: a vision-language model is needed (lvlm:...)")
    about: dict[str, Any] = {"host": loaded.fingerprint, "settings": settings._asdict(), "methods": list(methods)}
    decoder, edits, where = None, {}, ""
    if sae is not None:
        model = SAE.from_pretrained(sae).to(device)
        maps = None if aligner is None else Aligner.from_pretrained(aligner, device)
        about |= {"sae": sae_fingerprint(model), "aligner": aligner, "site": site}
        decoder = partial(_decoder, loaded, model, maps, site, allow_other_site)
    if {"ssl", "save"} & set(methods):
        if token_sae is None or probe is None:
            raise InputError("methods ssl and save need --token-sae, an SAE on tokens, and --probe, labelled shards")
        tokens = SAE.from_pretrained(token_sae).to(device)
        batches, labels = probe(loaded)
        edits, where, found = find_directions(loaded, tokens, batches, labels, gamma)
        about |= {"token_sae": sae_fingerprint(tokens), "gamma": gamma, **found}
    return Setup(loaded, make_methods(methods, loaded, settings, decoder, edits, where), about)


def _decoder(
    host: LVLMHost, sae: SAE, aligner: Aligner | None, site: str | None, mismatch: bool, settings: Settings
) -> ConceptDecoder:
    return ConceptDecoder(host, sae, aligner, settings, site, mismatch)


def find_directions(host: LVLMHost, sae: SAE, batches: Any, labels: list[str], gamma: float) -> tuple[dict, str, dict]:
    """SSL and SAVE edits, from questions whose answers are known, and what was found."""
    scorer = TokenScorer(host, sae)
    text, answers = [], []
    for batch in batches:
        text.append(scorer.pooled(batch)["text"].to_dense())
        answers += host.answer(batch, max_new_tokens=8)
    z = torch.cat(text)
    right = torch.tensor([a.lower().startswith(label) for a, label in zip(answers, labels, strict=True)])
    codes = scorer.pooled(batch)["text"]._replace(values=z, indices=None)
    many, one = find_latents(codes, right), find_latents(codes, right, 1)
    edits = {
        "ssl": ssl_edit(unit_direction(sae, one.faithful), unit_direction(sae, one.hallucination), gamma),
        "save": save_edit(unit_direction(sae, many.faithful), unit_direction(sae, many.hallucination), gamma),
    }
    site = next(iter(scorer.sites.values()))
    about = {"faithful": many.faithful.tolist(), "hallucination": many.hallucination.tolist(), "probed": many.answers}
    return edits, f"{site.module}:{site.io}", about


@contextmanager
def same_job(out: Path, job: dict[str, Any]) -> Iterator[None]:
    """Keep ``job`` in the folder.

    Raises:
        InputError: The folder holds another job.
    """
    file, job = out / "job.json", json.loads(json.dumps(job))
    if file.exists() and (old := json.loads(file.read_text())) != job:
        changed = next(k for k in {**old, **job} if old.get(k) != job.get(k))
        raise InputError(f"{file} is of another run: its {changed} differs; give another --out")
    with atomic_file(file) as temp:
        temp.write_text(json.dumps(job, indent=2) + "\n")
    yield


def probe_batches(
    host: LVLMHost, shards: Any, questions: Sequence[Question], prompt: str, batch_size: int
) -> Iterator[ImageTextBatch]:
    """Batches of questions in their order, for finding directions."""
    wanted, log = {q.image for q in questions}, FaultLog()
    pictures = {s.uid: s.image for s in read_shards(expand(shards), log, need=("image",)) if s.uid in wanted}
    if lost := sorted(wanted - set(pictures)):
        raise InputError(f"{len(lost)} of {len(wanted)} pictures of the probe {shards} cannot be read, {lost[0]} say")
    for i in range(0, len(questions), batch_size):
        part = questions[i : i + batch_size]
        make = lambda qs: host.collate.batch(  # noqa: E731
            [prompt.replace("{question}", q.text) for q in qs], [pictures[q.image] for q in qs]
        )
        batch, _ = tried(make, part, log, lambda q: (str(shards), q.image))
        if batch is None:
            raise InputError(f"a question of the probe cannot be asked: {log.summary().splitlines()[-1].strip()}")
        yield batch
