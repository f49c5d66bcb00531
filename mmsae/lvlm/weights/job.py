"""The work of ``mmsae weights``, tar by tar: whoever drives it, a process or ranks of Lightning, writes the same files.

One tar is one unit of work with one part file, so a killed job goes on where it stopped; parts are merged in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mmsae.files import atomic_folder, remove_leftovers
from mmsae.hosts import pick_device
from mmsae.hosts.lvlm.host import LVLMHost
from mmsae.jobs import JobFolder, Unit
from mmsae.jobs.processes import Local
from mmsae.jobs.units import Engine, Share, Work, do_missing, work_tars
from mmsae.load import load_pair
from mmsae.lvlm.options import RUN, Definition, TokenSample
from mmsae.lvlm.tokens import encode_tokens, named_lvlm, segment_sites
from mmsae.lvlm.weights.file import CFG, load_top, load_weights, save_weights
from mmsae.lvlm.weights.gallery import TokenSource, write_gallery
from mmsae.metrics.concepts.evidence import TopN, pack_uids
from mmsae.metrics.concepts.names import names_only, read_names
from mmsae.metrics.pairs.cross_modal import CrossModalWeights
from mmsae.metrics.pairs.item_codes import content_rows
from mmsae.metrics.pairs.modality import CoActivation
from mmsae.options import SAERun, Shards, at_least
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FaultLog, Sample, UnitBatch, count_samples, expand, identity, unit_batches
from mmsae.types import IMAGE, TEXT, Faults, ImageTextBatch, Tokens

TOP = 6  # strongest tokens of each modality that are kept per latent, one a sample


class Subset:
    """A host's collate that keeps a share of the samples, chosen by a hash of their uid."""

    def __init__(self, collate: Any, share: float, seed: int = 0):
        self.collate, self.share, self.seed = collate, share, seed

    @property
    def need(self) -> tuple[str, ...]:
        """What the host's collate reads of a sample."""
        return self.collate.need

    def __call__(self, samples: Sequence[Sample]) -> ImageTextBatch:
        """A batch of those that are kept; without inputs where there are none."""
        kept = [s for s in samples if self.keeps(s.uid)]
        return self.collate(kept) if kept else ImageTextBatch(None, None, [], [], [], [])

    def keeps(self, uid: str) -> bool:
        """Whether a sample is in the subset."""
        digest = blake2b(f"{self.seed}\0{uid}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.share * 2**64


class LatentStatistics(nn.Module):
    """The streaming metrics that make up a weights file."""

    def __init__(self, d_sae: int, width: int, definition: Definition):
        super().__init__()
        alone = {"sync_on_compute": False}  # ranks meet in the part files
        self.weights = CrossModalWeights(d_sae, width, **asdict(definition), **alone)
        self.lift = CoActivation(d_sae, self.weights.delta, **alone)
        # beside each token's uid: its position in the sequence, and the number of its tar
        self.top = nn.ModuleDict({m: TopN(d_sae, TOP, extra=2, **alone) for m in (IMAGE, TEXT)})

    def reset(self) -> None:
        """Forget everything."""
        for metric in self._metrics().values():
            metric.reset()

    def _metrics(self) -> dict[str, Any]:
        return {"weights": self.weights, "lift": self.lift, **{f"top.{m}": t for m, t in self.top.items()}}

    def update(self, sae: SAE, tokens: Tokens, tar: int = 0) -> None:
        """Add one batch of a tar."""
        codes = encode_tokens(sae, tokens)
        self.weights.update(codes, tokens)
        self.lift.update(codes, tokens)
        uids = pack_uids(tokens.uids)
        for m, metric in self.top.items():
            rows = content_rows(tokens, m).nonzero()[:, 0]
            position = torch.zeros_like(rows) if tokens.position is None else tokens.position[m][rows]
            extra = torch.stack([position, torch.full_like(position, tar)], 1)
            metric.update(codes[m].rows(rows), uids.to(rows.device)[tokens.item[m][rows]], extra=extra)

    def save(self, path: Path, faults: Faults) -> None:
        """Write what was seen to a part file."""
        tensors = {f"{name}.{k}": v for name, metric in self._metrics().items() for k, v in metric.part().items()}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path, {"faults": json.dumps(faults)})

    def merge(self, path: Path) -> Faults:
        """Add a part file, and return the faults of its tar."""
        tensors = load_file(path)
        for name, metric in self._metrics().items():
            metric.merge({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        with safe_open(path, "pt") as f:
            return Faults.read(json.loads(f.metadata()["faults"]))


class WeightsJob:
    """Cross-modal weights of an SAE on a host, from shards; arguments are those of :func:`cross_modal_weights`.

    Attributes:
        folder: The job's folder, which knows whether the result is there.
    """

    def __init__(
        self,
        host: LVLMHost,
        sae: SAE,
        shards: str | Sequence[str],
        out: str | Path,
        definition: Definition,
        sample: TokenSample,
        run: SAERun,
        data: Shards,
        workers: int = 0,
    ):
        at_least(1, samples=sample.samples, batch_size=run.batch_size)
        at_least(0, workers=run.workers)
        self.host, self.sae, self.run, self.fault_limit, self.workers = host, sae, run, data.fault_limit, workers
        self.paths = expand(shards)
        self.statistics = LatentStatistics(sae.d_sae, next(iter(sae.d_in.values())), definition).to(host.device)
        self.sites = segment_sites(sae, host, run.allow_other_site)
        self.about = {
            "sae": sae_fingerprint(sae),
            "host": host.fingerprint,
            "hint": host.hint,
            "sites": {m: s.to_dict() for m, s in self.sites.items()},
            "definition": self.statistics.weights.config(),
            "text": sample.text,
            "samples": sample.samples,
            "seed": sample.seed,
            "batch_size": run.batch_size,
            "data": identity(self.paths),
        }
        self.folder = JobFolder(out, self.about, "mmsae weights", result=CFG, but=("hint",))
        self.parts = self.folder.parts(self.paths)
        counted = 0 if sample.samples is None else sum(count_samples(p) for p in self.paths)
        share = 1.0 if sample.samples is None else min(1.0, sample.samples / max(1, counted))
        self.collate = Subset(host.collator(sample.text), share, sample.seed)

    def __str__(self) -> str:
        return (
            f"cross-modal weights of {self.sae.d_sae} latents at {next(iter(self.sites.values()))}, "
            f"from about {self.collate.share:.0%} of the samples of {len(self.paths)} shards"
        )

    @torch.no_grad()
    def work(self, share: Share) -> None:
        """Write the parts of some tars."""
        begin = {u.path: u for u in self.parts.units}
        stream = self._batches([self.parts.units[i] for i in share.units])
        work_tars(stream, lambda p: _Tar(self, begin[p]), share, "weights", self.fault_limit, self.run.progress)

    def _batches(self, todo: Sequence[Unit]) -> Iterator[UnitBatch]:
        """Batches of some tars, one tar after the other: what is known of one is as large as the result."""
        for unit in todo:
            stream = unit_batches(
                [unit.path], None, None, self.run.batch_size, workers=self.workers, collate=self.collate
            )
            with closing(stream):
                yield from stream

    @torch.no_grad()
    def finish(self, latents: Sequence[int] | None, names: Mapping[int, str] | None = None) -> FaultLog:
        """Merge the parts of all tars and write the result; one process does so, after all have worked.

        The page shows ``latents`` first, called by ``names``; None: there is no page.

        Raises:
            InputError: Too many samples were unusable.
        """
        log = FaultLog()
        self.statistics.reset()
        for part in self.parts.files():
            log.merge(self.statistics.merge(part))
        log.check(self.fault_limit, final=True)
        s, info = self.statistics, {**self.about, "faults": log.to_dict()}
        top = {m: metric.compute() for m, metric in s.top.items()}
        with atomic_folder(self.folder.out) as folder:
            save_weights(folder, s.weights.compute(), s.lift.compute(), info, top)
            if latents is not None:
                write_gallery(folder, top, self.source(), latents, names)
        remove_leftovers(self.folder.out)  # of killed runs
        return log

    def source(self) -> TokenSource:
        """How samples of the job are looked at again."""
        return TokenSource(self.host, self.sae, self.sites, self.collate.collate, self.paths, self.run.batch_size)


class _Tar:
    """The part of one tar; all tars of a process share the job's statistics."""

    def __init__(self, job: WeightsJob, unit: Unit):
        self.job, self.unit = job, unit
        job.statistics.reset()

    def add(self, batch: ImageTextBatch, log: FaultLog) -> None:
        self.job.statistics.update(self.job.sae, self.job.host.capture(batch, self.job.sites), self.unit.index)

    def finish(self, faults: FaultLog) -> None:
        found = faults.take()
        self.job.parts.write(self.unit, lambda temp: self.job.statistics.save(temp, found))

    def close(self) -> None:
        self.job.statistics.reset()


def cross_modal_weights(
    host: LVLMHost | str,
    sae: SAE | str,
    shards: str | Sequence[str],
    out: str | Path,
    definition: Definition = Definition(),
    sample: TokenSample = TokenSample(),
    run: SAERun = RUN,
    data: Shards = Shards(),
    latents: Sequence[int] | None = None,
    engine: Engine | None = None,
    names: str | None = None,
    names_of: tuple[str, str] = ("", ""),
) -> dict[str, Any]:
    """Do the job of ``mmsae weights``, or say that it is done.

    Arguments are those of :func:`mmsae.lvlm.weights.command.weights`, but ``host`` and ``sae`` may be loaded already.
    The page shows ``latents`` first; None: there is no page. Each process of ``engine`` calls this with all arguments;
    default: this process alone. ``names_of`` SAE and host is what other processes load, where both are loaded here.

    Returns:
        ``weights.json``, with the folder as ``out``.

    Raises:
        InputError: Another job in the folder, an SAE of another site, or too many unusable samples.
    """
    engine, called_by = engine or Local(), (sae, host) if isinstance(sae, str) else names_of
    given = (shards, out, definition, sample, run, data, engine.decoders(run.workers))
    sae, host = _loaded(sae, host, run, engine.rank)
    called = names_only(read_names(names, sae_fingerprint(sae)))
    job = WeightsJob(host, sae, *given)
    say, folder = print if run.progress and engine.lead else lambda text: None, job.folder
    if folder.finished:
        page = bool(latents or called)
        if page and engine.lead:
            top = load_top(folder.out, sae.d_sae, [name for name, _ in job.about["data"]])
            write_gallery(folder.out, top, job.source(), latents or (), called)
        say(f"{out}: finished before; {'only the page is new' if page else 'nothing to do'}")
        return {**load_weights(out).info, "out": str(out)}
    with folder.under(engine):
        say(str(job))
        do_missing(engine, job.parts.tally, job.work, _elsewhere, *called_by, *given)
        engine.merge(lambda: False, lambda: say(job.finish(latents, called).summary()))
    info = load_weights(out).info
    say(f"{info['weighted']} latents have a weight ({info['coverage']:.0%} of those that fire)")
    return {**info, "out": str(out)}


def _loaded(sae: SAE | str, host: LVLMHost | str, run: SAERun, rank: int) -> tuple[SAE, LVLMHost]:
    if isinstance(sae, str):
        sae, host = named_lvlm(sae, host)
    return load_pair(sae, host, pick_device(run.device, rank), run.precision, run.allow_other_site)


def _elsewhere(rank: int, sae: str, host: str, *given: Any) -> Work:
    """What does a process's tars, in a process that has loaded nothing."""
    model, loaded = _loaded(sae, host, given[4], rank)
    return WeightsJob(loaded, model, *given).work
