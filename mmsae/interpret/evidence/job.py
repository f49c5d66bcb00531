"""The job of ``mmsae evidence``: shards through the host, parts into one folder for each SAE.

A tar is a unit of work with a part file, so a killed job goes on where it stopped. Several SAEs of the same sites are
read in one pass of the host, and have a job each all the same: every folder has the bytes of a run of its own. The
codes of all rows are needed of items in evidence alone, which are known only when every tar was read: where they are
small they are kept at once, else tars go through the host once more, in the same batches, so that no bit differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mmsae.files import disk_errors, write_json
from mmsae.hosts import Generates, Host, parse
from mmsae.interpret.evidence.corpus import CorpusItems
from mmsae.interpret.evidence.drawn import PROMPTS, corpus_paths, text_samples
from mmsae.interpret.evidence.folder import ABOUT, FORMAT
from mmsae.interpret.evidence.merge import (
    write_codes,
    write_embeddings,
    write_items,
    write_lists,
    write_stats,
)
from mmsae.interpret.evidence.options import Evidencing
from mmsae.interpret.evidence.parts import CodesPart, EvidenceTar, TarParts, TokensPart
from mmsae.interpret.evidence.reader import Content, EvidencePlan, EvidenceReader
from mmsae.interpret.evidence.shown import write_tokens
from mmsae.jobs import JobFolder
from mmsae.jobs.engines import engine_of
from mmsae.jobs.estimate import estimate
from mmsae.jobs.folder import JOB, begun_job
from mmsae.jobs.tally import Tally
from mmsae.jobs.units import Engine, Parts, Share, Unit, Work, missing, work_tars
from mmsae.load import named_pair
from mmsae.options import Data, Drawing, SAERun, Spread, at_least, side_by_side
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FaultLog, UnitBatch, count_samples, identity
from mmsae.types import IMAGE, ImageTextBatch, InputError

DRAWN = 8  # images that are drawn at a time, if nobody says
BYTES = 12  # of an entry of the codes of all rows on the disk
WANTED, FIRST = "wanted.npy", "first.npy"  # which items are in evidence, and the first item of every tar


@side_by_side
def collect_evidence(
    sae: SAE | str | Sequence[SAE | str],
    shards: str | Sequence[str],
    out: str | Path | Sequence[str | Path],
    host: Host | str = "",
    choice: Evidencing = Evidencing(),
    run: SAERun = SAERun(),
    data: Data = Data(),
    spread: Spread = Spread(),
    drawing: Drawing = Drawing(),
    engine: Engine | None = None,
) -> dict[str, Any] | list[dict[str, Any]] | None:
    """Do the job of ``mmsae evidence``, or say that it is done.

    Arguments are those of :func:`mmsae.interpret.evidence.command.evidence`, but ``sae`` and ``host`` may be loaded
    already, on one device. Each process of ``engine`` calls this with all arguments.

    Returns:
        ``evidence.json``, with the folder as ``out``, or one for each of several SAEs; None where other parts of the
        job have to go on.

    Raises:
        InputError: Another job in the folder, an SAE of another site, not as many folders as SAEs, no image or caption
            that the SAE reads, too many unusable samples, or a uid that occurs twice.
    """
    with engine_of(spread, run, engine) as engine:
        single = isinstance(sae, (SAE, str))
        saes, outs = [sae] if single else list(sae), [out] if isinstance(out, (str, Path)) else list(out)
        found = EvidenceJob(saes, shards, outs, host, choice, run, data, drawing, engine).run()
        return found[0] if single else found
    return None


class SAEJob(NamedTuple):
    """What is done for one of the SAEs."""

    number: int  #: Its place among the SAEs
    folder: JobFolder  #: Where its job is done
    codes: Parts  #: Its ``codes`` parts
    tokens: Parts  #: Its ``tokens`` parts


class EvidenceJob:
    """Jobs that can be begun, of SAEs that are read in one pass; arguments are those of :func:`collect_evidence`, with
    as many ``outs`` as ``saes``.

    Attributes:
        jobs: That of each SAE.
        reader: Host and SAEs of this process.
    """

    def __init__(
        self, saes: Sequence[SAE | str], shards: str | Sequence[str], outs: Sequence[str | Path], host: Host | str,
        choice: Evidencing, run: SAERun, data: Data, drawing: Drawing, engine: Engine,
    ) -> None:  # fmt: skip
        self.engine = engine
        counts = ("n_top", "quantiles", "each", "min_items", "candidates", "pixels", "at_steps")
        asked = {n: getattr(choice, n) for n in counts} | {"batch_size": run.batch_size}
        at_least(1, **asked)
        at_least(0, negatives=choice.negatives, workers=run.workers)
        if not saes or len(outs) != len(saes):
            raise InputError(f"sae names {len(saes)} SAEs and out {len(outs)} folders; each SAE needs a folder")
        if len({os.path.abspath(o) for o in outs}) < len(outs):
            raise InputError(f"out names one folder twice among {', '.join(map(str, outs))}; each SAE needs its own")
        if engine.elsewhere(2) and not all(isinstance(given, str) for given in (*saes, host)):
            raise InputError(
                f"{engine.size} processes are to work, but what is loaded already runs on 1; give names of SAE and host"
            )
        paths = corpus_paths(shards)
        first = saes[0]
        if isinstance(host, str):
            first, name = named_pair(first, host)
        else:
            first, name = (SAE.from_pretrained(first) if isinstance(first, str) else first), host.hint
        content = Content.of(paths, data.caption_field)
        draws = parse(name).kind == "diffusers" if isinstance(host, str) else isinstance(host, Generates)
        modalities = content.modalities(list(first.sites), paths[0], draws)
        drawing = drawing if draws and IMAGE in modalities else None
        workers = engine.decoders(run.workers)
        names = tuple(s if isinstance(s, str) else "" for s in saes)
        works = tuple(f"{out}.partial" for out in outs)
        self.plan = EvidencePlan(
            names, name, paths, works, modalities, content.captions, content.images or drawing is not None, choice,
            run, 0, workers, data.caption_field, data.fault_limit, drawing,
        )  # fmt: skip
        self.reader = EvidenceReader(self.plan, [first, *saes[1:]], host if isinstance(host, Host) else name)
        begun = [begun_job(Path(o) / ABOUT, Path(f"{o}.partial") / JOB) for o in outs]
        known = next((b["batch_size"] for b in begun if b.get("batch_size")), None)
        asked = known if run.batch_size is None else run.batch_size
        size = DRAWN if asked is None and drawing is not None else self.reader.host.batch_size(asked)
        self.plan = self.reader.plan = self.plan._replace(batch_size=size)
        self.jobs = []
        for i, out in enumerate(outs):
            folder = JobFolder(
                out, self._about(self.reader.saes[i], begun[i].get("sites", {})), "mmsae evidence", result=ABOUT,
                beside=True, but=("hint",),
            )  # fmt: skip
            parts = [folder.parts(paths, kind, ".safetensors") for kind in ("codes", "tokens")]
            self.jobs.append(SAEJob(i, folder, *parts))

    def _about(self, sae: SAE, begun: dict[str, Any]) -> dict[str, Any]:
        """What identifies the job; ``begun`` are the sites of one that lies there, whose host may have moved since."""
        plan, r = self.plan, self.reader
        sites = {m: s.to_dict() for m, s in r.sites.items() if m in plan.modalities}
        for m, site in sites.items():
            if begun.get(m, {}).get("host") == site["host"]:
                site["hint"] = begun[m]["hint"]
        settings = {k: v for k, v in vars(plan.choice).items() if k not in ("embedder", "keep_gb")}
        return {
            "sae": sae_fingerprint(sae),
            "host": r.host.fingerprint,
            "hint": r.host.hint,
            "embedder": "" if r.embedder is None else r.embedder.fingerprint,
            "sites": sites,
            "pool": "max",
            "modalities": list(plan.modalities),
            **settings,
            "drawing": None if plan.drawing is None else vars(plan.drawing),
            "batch_size": plan.batch_size,
            "precision": r.host.precision,
            "device": r.host.device.type,
            "caption_field": plan.caption_field,
            "shards": identity(plan.paths),
        }

    def run(self) -> list[dict[str, Any]]:
        """Do the jobs, or what is left of them, in each process of the engine."""
        engine = self.engine
        say = print if self.plan.run.progress and engine.lead else lambda text: None
        for job in (j for j in self.jobs if j.folder.finished):
            say(f"{job.folder.out}: finished before; nothing to do")
        if left := [j for j in self.jobs if not j.folder.finished]:
            with ExitStack() as held:
                for job in left:
                    held.enter_context(job.folder.under(engine))
                    held.enter_context(disk_errors(job.folder.work))
                self._run(left, say)
        return [_read(j.folder.out) for j in self.jobs]

    def _run(self, left: Sequence[SAEJob], say: Callable[[str], None]) -> None:
        engine = self.engine
        engine.wait()
        codes, tokens = _together([j.codes for j in left]), _together([j.tokens for j in left])
        numbers = tuple(j.number for j in left)
        if todo := missing(engine, codes):
            keep = engine.size > 0 and engine.agree(lambda: self._try_out(todo, engine, say))
            here = _worker(self.reader, numbers, True, keep)
            engine.run(codes, todo, here, _elsewhere, self.plan, numbers, True, keep)
        merged: list[Any] = []

        def merge() -> None:
            merged[:] = self._merge(left)
            for job, (wanted, corpus, _) in zip(left, merged, strict=True):
                np.save(job.folder.work / WANTED, wanted)
                np.save(job.folder.work / FIRST, corpus.first)

        engine.merge(lambda: all((j.folder.work / FIRST).exists() for j in left), merge)
        if todo := missing(engine, tokens):
            say(f"codes of all rows of the items in evidence: {len(todo)} shards once more")
            here = _worker(self.reader, numbers, False, True)
            engine.run(tokens, todo, here, _elsewhere, self.plan, numbers, False, True)
        engine.merge(lambda: False, lambda: self._finish(left, merged))

    def _finish(self, left: Sequence[SAEJob], merged: Sequence[tuple[np.ndarray, CorpusItems, dict[str, Any]]]) -> None:
        for job, (wanted, corpus, about) in zip(left, merged, strict=True):
            write_tokens(job.folder.draft, corpus, job.tokens.files(), wanted)
            write_json(job.folder.draft / ABOUT, about)
            job.folder.publish()

    def _try_out(self, todo: Sequence[int], engine: Engine, say: Callable[[str], None]) -> bool:
        """Say how much there is to do; returns whether the codes of all rows are few enough to be kept at once."""
        plan, r = self.plan, self.reader
        paths, per_item = [plan.paths[u] for u in todo], [0.0]

        def look(batch: ImageTextBatch) -> None:
            looked = r.look(batch, FaultLog()).values()
            per_item[0] = sum(len(f.item) for one in looked for f in one.fired.values()) / max(1, len(batch.uids))

        def stream(some: Sequence[str], size: int) -> Iterator[UnitBatch]:
            r.plan = plan._replace(workers=0, batch_size=size)
            return r.stream(some)

        where = ", ".join(f"{m} at {s.spec}" for m, s in r.sites.items() if m in plan.modalities)
        say(f"evidence of {' and '.join(str(s.d_sae) for s in r.saes)} latents: {where}")
        devices, done, device = min(engine.size, len(todo)), len(plan.paths) - len(todo), r.host.device.type
        try:
            if plan.drawing is None and not paths[0].endswith(PROMPTS):
                about = estimate(paths, done, stream, look, plan.batch_size, plan.workers, devices, device != "cpu")
                say(f"  {about}{about.takes(devices, device)}")
                samples = about.samples
            else:  # drawing a batch to time it would cost a part of the work
                samples = sum(len(text_samples(p)) if p.endswith(PROMPTS) else count_samples(p) for p in paths)
                say(f"  about {samples} texts")
                with closing(stream(paths, 1)) as batches:
                    first = next(step.batch for step in batches)
                if first.uids:
                    look(first)
        finally:
            r.plan = plan
        return BYTES * per_item[0] * samples * len(plan.paths) / max(1, len(todo)) <= plan.choice.keep_gb * 1e9

    def _merge(self, left: Sequence[SAEJob]) -> list[tuple[np.ndarray, CorpusItems, dict[str, Any]]]:
        """``(items in evidence, items, evidence.json)`` of each SAE; who the items are is the same for all."""
        corpus = CorpusItems.read(left[0].codes.files(), self.plan.modalities)
        corpus.faults.check(self.plan.fault_limit, final=True)
        return [self._merge_one(job, corpus._replace(paths=job.codes.files())) for job in left]

    def _merge_one(self, job: SAEJob, corpus: CorpusItems) -> tuple[np.ndarray, CorpusItems, dict[str, Any]]:
        """Everything but the codes of all rows; what is not needed again is not held."""
        plan, r, draft, d_sae = self.plan, self.reader, job.folder.draft, self.reader.saes[job.number].d_sae
        draft.mkdir(parents=True, exist_ok=True)
        write_items(draft, corpus)
        for m in plan.modalities:
            write_codes(draft, corpus, m)
        embed = write_embeddings(draft, corpus, r.embeds)
        counts = write_stats(draft, corpus, plan.modalities, d_sae)
        wanted, chosen = write_lists(
            draft, corpus, plan.modalities, d_sae, plan.choice, embed, r.host.device, plan.run.progress
        )
        embedder = "" if r.embedder is None else r.embedder.hint
        latents = {m: {**chosen[m], "rows": counts[m].rows, "d_sae": d_sae} for m in plan.modalities}
        about = {
            "format": FORMAT,
            "job": job.folder.job,
            "n_items": corpus.n,
            "d_sae": d_sae,
            "modalities": list(plan.modalities),
            "grid": {m: {"rows": corpus.grid.get(m, (0, 0))[0], "cols": corpus.grid.get(m, (0, 0))[1],
                         "places": corpus.places[m],
                         "steps": list(plan.steps) if m == IMAGE else []} for m in plan.modalities},
            "captions": plan.captions,
            "images": plan.images,
            "embedder": dict.fromkeys(r.embeds, embedder),
            "hard_negatives": {m: f"cosine of embeddings by {embedder}" if m in embed else "cosine of pooled codes"
                               for m in plan.modalities},
            "latents": latents,
            "in_evidence": int(wanted.sum()),
            "faults": corpus.faults.to_dict(),
        }  # fmt: skip
        if plan.run.progress:
            print(corpus.faults.summary() if len(self.jobs) == 1 else f"{job.folder.out}: {corpus.faults.summary()}")
            for m, said in latents.items():
                alive, skipped = said["alive"], 1 - said["eligible"] / max(1, said["alive"])
                print(f"{m}: {alive} of {d_sae} latents fire, {skipped:.1%} of them on fewer than "
                      f"{plan.choice.min_items} items and not eligible; {said['copies']} near-duplicates")  # fmt: skip
        return wanted, corpus, about


def _read(out: Path) -> dict[str, Any]:
    import json

    return {**json.loads((out / ABOUT).read_text(encoding="utf-8")), "out": str(out)}


def _together(parts: Sequence[Parts]) -> Tally:
    """The tally of passes that are made together."""
    first, *others = (p.tally for p in parts)
    return first._replace(also=tuple(others))


def _worker(reader: EvidenceReader, numbers: Collection[int], codes: bool, tokens: bool) -> Work:
    """What writes the parts of one process's tars, of the SAEs with these numbers, where they are missing."""
    plan = reader.plan
    works = {i: Path(plan.works[i]) for i in numbers}
    kinds = {i: [Parts(w / k, plan.paths, ".safetensors") for k in ("codes", "tokens")] for i, w in works.items()}
    unit_of: dict[str, Unit] = {u.path: u for own in kinds.values() for u in own[0].units}
    wanted = {} if codes else {i: torch.from_numpy(np.load(w / WANTED)) for i, w in works.items()}
    first = None if codes else np.load(next(iter(works.values())) / FIRST)

    def begin(path: str) -> EvidenceTar:
        unit, made = unit_of[path], {}
        for i, (of_codes, of_tokens) in kinds.items():
            if (of_codes if codes else of_tokens).done(unit):
                continue
            own = None if first is None else wanted[i][first[unit.index] : first[unit.index + 1]]
            made[i] = TarParts(
                CodesPart(of_codes.path(unit), reader.saes[i].d_sae, plan.modalities) if codes else None,
                TokensPart(of_tokens.path(unit), plan.modalities) if tokens else None,
                own,
            )
        return EvidenceTar(reader, made)

    def work(share: Share) -> None:
        paths = [plan.paths[u] for u in share.units]
        work_tars(reader.stream(paths), begin, share, "evidence", plan.fault_limit, plan.run.progress)

    return work


_reader: EvidenceReader | None = None  # in a process that works and does not lead: loaded once for both passes


def _elsewhere(rank: int, plan: EvidencePlan, numbers: Collection[int], codes: bool, tokens: bool) -> Work:
    """What does a process's tars, in a process that has loaded nothing."""
    global _reader
    _reader = _reader or EvidenceReader(plan, rank=rank)
    return _worker(_reader, numbers, codes, tokens)
