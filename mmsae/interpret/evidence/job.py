"""The job of ``mmsae evidence``: shards through the host, parts into one folder.

A tar is a unit of work with a part file, so a killed job goes on where it stopped. The codes of all rows are needed of
items in evidence alone, which are known only when every tar was read: where they are small they are kept at once, else
tars go through the host once more, in the same batches, so that no bit differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

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
from mmsae.interpret.evidence.parts import EvidenceTar
from mmsae.interpret.evidence.reader import Content, EvidencePlan, EvidenceReader
from mmsae.interpret.evidence.shown import write_tokens
from mmsae.jobs import JobFolder
from mmsae.jobs.engines import engine_of
from mmsae.jobs.estimate import estimate
from mmsae.jobs.folder import JOB, begun_job
from mmsae.jobs.units import Engine, Parts, Share, Unit, Work, missing, work_tars
from mmsae.load import named_pair
from mmsae.options import Data, Drawing, SAERun, Spread, at_least, side_by_side
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FaultLog, UnitBatch, count_samples, identity
from mmsae.types import IMAGE, ImageTextBatch, InputError

DRAWN = 8  # images that are drawn at a time, if nobody says
BYTES = 12  # of an entry of the codes of all rows on the disk


@side_by_side
def collect_evidence(
    sae: SAE | str,
    shards: str | Sequence[str],
    out: str | Path,
    host: Host | str = "",
    choice: Evidencing = Evidencing(),
    run: SAERun = SAERun(),
    data: Data = Data(),
    spread: Spread = Spread(),
    drawing: Drawing = Drawing(),
    engine: Engine | None = None,
) -> dict[str, Any] | None:
    """Do the job of ``mmsae evidence``, or say that it is done.

    Arguments are those of :func:`mmsae.interpret.evidence.command.evidence`, but ``sae`` and ``host`` may be loaded
    already, on one device. Each process of ``engine`` calls this with all arguments.

    Returns:
        ``evidence.json``, with the folder as ``out``; None where other parts of the job have to go on.

    Raises:
        InputError: Another job in the folder, an SAE of another site, no image or caption that the SAE reads, too many
            unusable samples, or a uid that occurs twice.
    """
    with engine_of(spread, run, engine) as engine:
        return EvidenceJob(sae, shards, out, host, choice, run, data, drawing, engine).run()
    return None


class EvidenceJob:
    """A job that can be begun; arguments are those of :func:`collect_evidence`.

    Attributes:
        folder: Where the job is done.
        reader: Host and SAE of this process.
    """

    def __init__(
        self, sae: SAE | str, shards: str | Sequence[str], out: str | Path, host: Host | str, choice: Evidencing,
        run: SAERun, data: Data, drawing: Drawing, engine: Engine,
    ) -> None:  # fmt: skip
        self.engine = engine
        counts = ("n_top", "quantiles", "each", "min_items", "candidates", "pixels", "at_steps")
        asked = {n: getattr(choice, n) for n in counts} | {"batch_size": run.batch_size}
        at_least(1, **asked)
        at_least(0, negatives=choice.negatives, workers=run.workers)
        if engine.elsewhere(2) and not (isinstance(sae, str) and isinstance(host, str)):
            raise InputError(
                f"{engine.size} processes are to work, but what is loaded already runs on 1; give names of SAE and host"
            )
        paths = corpus_paths(shards)
        if isinstance(host, str):
            sae_object, name = named_pair(sae, host)
        else:
            sae_object, name = (SAE.from_pretrained(sae) if isinstance(sae, str) else sae), host.hint
        content = Content.of(paths, data.caption_field)
        draws = parse(name).kind == "diffusers" if isinstance(host, str) else isinstance(host, Generates)
        modalities = content.modalities(list(sae_object.sites), paths[0], draws)
        drawing = drawing if draws and IMAGE in modalities else None
        workers = engine.decoders(run.workers)
        self.plan = EvidencePlan(
            sae if isinstance(sae, str) else "", name, paths, f"{out}.partial", modalities, content.captions,
            content.images or drawing is not None, choice, run, 0, workers, data.caption_field, data.fault_limit,
            drawing,
        )  # fmt: skip
        self.reader = EvidenceReader(self.plan, sae_object, host if isinstance(host, Host) else name)
        begun = begun_job(Path(out) / ABOUT, Path(f"{out}.partial") / JOB)
        asked = begun.get("batch_size") if run.batch_size is None else run.batch_size
        size = DRAWN if asked is None and drawing is not None else self.reader.host.batch_size(asked)
        self.plan = self.reader.plan = self.plan._replace(batch_size=size)
        self.folder = JobFolder(
            out, self._about(begun.get("sites", {})), "mmsae evidence", result=ABOUT, beside=True, but=("hint",)
        )
        self.codes = self.folder.parts(paths, "codes", ".safetensors")
        self.tokens = self.folder.parts(paths, "tokens", ".safetensors")

    def _about(self, begun: dict[str, Any]) -> dict[str, Any]:
        """What identifies the job; ``begun`` are the sites of one that lies there, whose host may have moved since."""
        plan, r = self.plan, self.reader
        sites = {m: s.to_dict() for m, s in r.sites.items() if m in plan.modalities}
        for m, site in sites.items():
            if begun.get(m, {}).get("host") == site["host"]:
                site["hint"] = begun[m]["hint"]
        settings = {k: v for k, v in vars(plan.choice).items() if k not in ("embedder", "keep_gb")}
        return {
            "sae": sae_fingerprint(r.sae),
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

    def run(self) -> dict[str, Any]:
        """Do the job, or what is left of it, in each process of the engine."""
        folder, out, engine = self.folder, self.folder.out, self.engine
        say = print if self.plan.run.progress and engine.lead else lambda text: None
        if folder.finished:
            say(f"{out}: finished before; nothing to do")
            return _read(out)
        with folder.under(engine), disk_errors(folder.work):
            engine.wait()
            if todo := missing(engine, self.codes.tally):
                keep = engine.size > 0 and engine.agree(lambda: self._try_out(todo, engine, say))
                engine.run(self.codes.tally, todo, _worker(self.reader, True, keep), _elsewhere, self.plan, True, keep)
            merged: list[Any] = []
            first = folder.work / "first.npy"

            def merge() -> None:
                merged[:] = self._merge()
                np.save(folder.work / "wanted.npy", merged[0])
                np.save(first, merged[1].first)

            engine.merge(first.exists, merge)
            if todo := missing(engine, self.tokens.tally):
                say(f"codes of all rows of the items in evidence: {len(todo)} shards once more")
                here = _worker(self.reader, False, True)
                engine.run(self.tokens.tally, todo, here, _elsewhere, self.plan, False, True)
            engine.merge(lambda: False, lambda: self._finish(*merged))
        return _read(out)

    def _finish(self, wanted: np.ndarray, corpus: CorpusItems, about: dict[str, Any]) -> None:
        write_tokens(self.folder.draft, corpus, self.tokens.files(), wanted)
        write_json(self.folder.draft / ABOUT, about)
        self.folder.publish()

    def _try_out(self, todo: Sequence[int], engine: Engine, say: Any) -> bool:
        """Say how much there is to do; returns whether the codes of all rows are few enough to be kept at once."""
        plan, r = self.plan, self.reader
        paths, per_item = [plan.paths[u] for u in todo], [0.0]

        def look(batch: ImageTextBatch) -> None:
            looked = r.look(batch, FaultLog())
            per_item[0] = sum(len(f.item) for f in looked.fired.values()) / max(1, len(batch.uids))

        def stream(some: Sequence[str], size: int) -> Iterator[UnitBatch]:
            r.plan = plan._replace(workers=0, batch_size=size)
            return r.stream(some)

        where = ", ".join(f"{m} at {s.spec}" for m, s in r.sites.items() if m in plan.modalities)
        say(f"evidence of {r.sae.d_sae} latents: {where}")
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

    def _merge(self) -> tuple[np.ndarray, CorpusItems, dict[str, Any]]:
        """Everything but the codes of all rows; what is not needed again is not held."""
        plan, r, draft = self.plan, self.reader, self.folder.draft
        draft.mkdir(parents=True, exist_ok=True)
        corpus = CorpusItems.read(self.codes.files(), plan.modalities)
        corpus.faults.check(plan.fault_limit, final=True)
        write_items(draft, corpus)
        for m in plan.modalities:
            write_codes(draft, corpus, m)
        embed = write_embeddings(draft, corpus, r.embeds)
        counts = write_stats(draft, corpus, plan.modalities, r.sae.d_sae)
        wanted, chosen = write_lists(
            draft, corpus, plan.modalities, r.sae.d_sae, plan.choice, embed, r.host.device, plan.run.progress
        )
        embedder = "" if r.embedder is None else r.embedder.hint
        latents = {m: {**chosen[m], "rows": counts[m].rows, "d_sae": r.sae.d_sae} for m in plan.modalities}
        about = {
            "format": FORMAT,
            "job": self.folder.job,
            "n_items": corpus.n,
            "d_sae": r.sae.d_sae,
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
            print(corpus.faults.summary())
            for m, said in latents.items():
                alive, skipped = said["alive"], 1 - said["eligible"] / max(1, said["alive"])
                print(f"{m}: {alive} of {r.sae.d_sae} latents fire, {skipped:.1%} of them on fewer than "
                      f"{plan.choice.min_items} items and not eligible; {said['copies']} near-duplicates")  # fmt: skip
        return wanted, corpus, about


def _read(out: Path) -> dict[str, Any]:
    import json

    return {**json.loads((out / ABOUT).read_text(encoding="utf-8")), "out": str(out)}


def _worker(reader: EvidenceReader, codes: bool, tokens: bool) -> Work:
    """What writes the parts of one process's tars."""
    plan = reader.plan
    work = Path(plan.work)
    kinds = [Parts(work / k, plan.paths, ".safetensors") for k in ("codes", "tokens")]
    unit_of = {u.path: u for u in kinds[0].units}
    wanted = first = None
    if not codes:
        wanted, first = torch.from_numpy(np.load(work / "wanted.npy")), np.load(work / "first.npy")

    def begin(path: str) -> EvidenceTar:
        unit: Unit = unit_of[path]
        own = None if wanted is None else wanted[first[unit.index] : first[unit.index + 1]]
        return EvidenceTar(reader, unit, kinds[0] if codes else None, kinds[1] if tokens else None, own)

    def work(share: Share) -> None:
        paths = [plan.paths[u] for u in share.units]
        work_tars(reader.stream(paths), begin, share, "evidence", plan.fault_limit, plan.run.progress)

    return work


_reader: EvidenceReader | None = None  # in a process that works and does not lead: loaded once for both passes


def _elsewhere(rank: int, plan: EvidencePlan, codes: bool, tokens: bool) -> Work:
    """What does a process's tars, in a process that has loaded nothing."""
    global _reader
    _reader = _reader or EvidenceReader(plan, rank=rank)
    return _worker(_reader, codes, tokens)
