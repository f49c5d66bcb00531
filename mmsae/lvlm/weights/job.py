"""The work of ``mmsae weights``, tar by tar: whoever drives it, a process or ranks of Lightning, writes the same files.

One tar is one unit of work with one part file, so a killed job goes on where it stopped; parts are merged in order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mmsae.files import atomic_file, remove_leftovers
from mmsae.hosts import Host
from mmsae.jobs.units import Unit, done, part_path, units, write_part
from mmsae.lvlm.tokens import encode_tokens, segment_sites
from mmsae.lvlm.weights.file import CFG, CrossModalFile, load_top, load_weights, save_weights
from mmsae.metrics.concepts.evidence import TopN, TopTable, pack_uids
from mmsae.metrics.pairs.cross_modal import CrossModalWeights
from mmsae.metrics.pairs.item_codes import content_rows
from mmsae.metrics.pairs.modality import CoActivation
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FAULT_LIMIT, FaultLog, Sample, UnitBatch, count_samples, expand, identity, unit_batches
from mmsae.types import IMAGE, TEXT, Faults, ImageTextBatch, InputError, Tokens

TextChoice = Literal["question", "question+answer"]
JOB, PARTS = "job.json", "parts"
TOP = 6  # strongest tokens of each modality that are kept per latent, one a sample


class Subset:
    """A host's collate that keeps a share of the samples, chosen by a hash of their uid.

    Args:
        collate: The host's.
        share: Of the samples, 0 to 1.
        seed: Of the choice.
    """

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


class Evidence(nn.Module):
    """The streaming metrics that make up a weights file.

    Args:
        d_sae: Number of latents.
        width: Of the hidden vectors.
        **definition: Of :class:`~mmsae.metrics.pairs.cross_modal.CrossModalWeights`.
    """

    def __init__(self, d_sae: int, width: int, **definition: Any):
        super().__init__()
        alone = {"sync_on_compute": False}  # ranks meet in the part files
        self.weights = CrossModalWeights(d_sae, width, **definition, **alone)
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

    def merge(self, path: Path) -> None:
        """Add a part file."""
        tensors = load_file(path)
        for name, metric in self._metrics().items():
            metric.merge({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})


class Found(NamedTuple):
    """What a report shows of a finished job.

    Attributes:
        folder: Where the result is being put together.
        file: The weights, as they are stored.
        top: ``{modality: strongest tokens}``; ``extra`` holds each token's position and the number of its tar.
        job: Host, SAE, sites, tars and the collate that made the sequences.
    """

    folder: Path
    file: CrossModalFile
    top: dict[str, TopTable]
    job: WeightsJob


class WeightsJob:
    """Cross-modal weights of an SAE on a host, from shards.

    Args:
        host: The host.
        sae: An SAE on its tokens.
        shards: Path, folder, glob or brace pattern of tars, or several.
        out: Folder to write.
        text: Which text is part of a sequence.
        definition: Arguments of :class:`~mmsae.metrics.pairs.cross_modal.CrossModalWeights`.
        samples: About so many are looked at; None for all.
        batch_size: Samples per forward pass.
        workers: Decoding processes.
        seed: Of the choice of samples.
        fault_limit: Largest share of samples that may be unusable.
        allow_other_site: Accept an SAE that was trained on another host.

    Attributes:
        finished: Whether the result is there already.

    Raises:
        InputError: Another job in the folder, or an SAE of another site.
    """

    def __init__(
        self,
        host: Host,
        sae: SAE,
        shards: str | Sequence[str],
        out: str | Path,
        *,
        text: TextChoice = "question",
        definition: dict[str, Any] | None = None,
        samples: int | None = 1000,
        batch_size: int = 8,
        workers: int = 0,
        seed: int = 0,
        fault_limit: float = FAULT_LIMIT,
        allow_other_site: bool = False,
    ):
        for name, n, least in (("samples", samples, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
            if n is not None and n < least:
                raise InputError(f"{name} is {n}; it must be at least {least}")
        self.host, self.sae, self.paths, self.out = host, sae, expand(shards), Path(out)
        self.batch_size, self.workers, self.fault_limit = batch_size, workers, fault_limit
        self.evidence = Evidence(sae.d_sae, next(iter(sae.d_in.values())), **(definition or {})).to(host.device)
        self.sites = segment_sites(sae, host, allow_other_site)
        self.about = {
            "sae": sae_fingerprint(sae),
            "host": host.fingerprint,
            "hint": host.hint,
            "sites": {m: s.to_dict() for m, s in self.sites.items()},
            "definition": self.evidence.weights.config(),
            "text": text,
            "samples": samples,
            "seed": seed,
            "batch_size": batch_size,
            "data": identity(self.paths),
        }
        self.parts, self.finished = self.out / PARTS, (self.out / CFG).exists()
        if self.finished:
            _same_job(self.about, load_weights(self.out).info, self.out / CFG)
        elif (self.out / JOB).exists():
            _same_job(self.about, json.loads((self.out / JOB).read_text()), self.out / JOB)
        elif _holds_other(self.out):  # it would be replaced as a whole
            raise InputError(f"{self.out} exists and holds no result of mmsae weights; choose another --out")
        counted = 0 if samples is None else sum(count_samples(p) for p in self.paths)
        self.share = 1.0 if samples is None else min(1.0, samples / max(1, counted))
        self.collate = Subset(host.collator(text), self.share, seed)
        self._path, self._log = "", FaultLog()

    def begin(self) -> None:
        """Make the folder; one process does so, before any works."""
        with atomic_file(self.out / JOB) as temp:
            temp.write_text(json.dumps(self.about, indent=2) + "\n")
        self.parts.mkdir(parents=True, exist_ok=True)

    def describe(self) -> str:
        """One sentence about what will be done."""
        return (
            f"cross-modal weights of {self.sae.d_sae} latents at {next(iter(self.sites.values()))}, "
            f"from about {self.share:.0%} of the samples of {len(self.paths)} shards"
        )

    def todo(self, rank: int = 0, world: int = 1) -> list[Unit]:
        """This rank's tars that have no part yet."""
        return [u for u in units(self.paths)[rank::world] if not done(self.parts, u)]

    def batches(self, todo: Sequence[Unit]) -> Iterator[UnitBatch]:
        """Batches of some tars, one tar after the other: what is known of one is as large as the result."""
        for unit in todo:
            stream = unit_batches([unit.path], None, None, self.batch_size, workers=self.workers, collate=self.collate)
            with closing(stream):
                yield from stream

    @torch.no_grad()
    def add(self, step: UnitBatch) -> None:
        """Add a batch, and write the part of its tar after the last."""
        unit = next(u for u in units(self.paths) if u.path == step.path)
        if step.path != self._path:
            self._path, self._log = step.path, FaultLog()
            self.evidence.reset()
        self._log.merge(step.batch.faults)
        if step.batch.uids:
            self.evidence.update(self.sae, self.host.capture(step.batch, self.sites), unit.index)
        if step.last:
            faults, self._path = self._log.take(), ""
            write_part(self.parts, unit, lambda temp: self.evidence.save(temp, faults))

    def found(self) -> Found:
        """The result of a job that is finished."""
        top = load_top(self.out, self.sae.d_sae, [name for name, _ in self.about["data"]])
        return Found(self.out, load_weights(self.out), top, self)

    @torch.no_grad()
    def finish(self, present: Callable[[Found], None] | None = None) -> FaultLog:
        """Merge the parts of all tars and write the result; one process does so, after all have worked.

        Args:
            present: Called with the result before it appears, to put a page beside it.

        Raises:
            InputError: Too many samples were unusable.
        """
        log = FaultLog()
        self.evidence.reset()
        for unit in units(self.paths):
            part = part_path(self.parts, unit)
            log.merge(_faults(part))
            self.evidence.merge(part)
        log.check(self.fault_limit, final=True)
        top = {m: metric.compute() for m, metric in self.evidence.top.items()}

        def page(folder: Path) -> None:
            if present is not None:
                present(Found(folder, load_weights(folder), top, self))

        found, lift = self.evidence.weights.compute(), self.evidence.lift.compute()
        save_weights(self.out, found, lift, {**self.about, "faults": log.to_dict()}, top, page)
        shutil.rmtree(self.parts, ignore_errors=True)
        remove_leftovers(self.out)  # of killed runs
        return log


def _holds_other(out: Path) -> bool:
    return out.is_file() or (out.is_dir() and any(not p.name.startswith(f".{JOB}") for p in out.iterdir()))


def _faults(path: Path) -> Faults:
    with safe_open(path, "pt") as f:
        seen, counts, examples = json.loads(f.metadata()["faults"])
    return Faults(seen, counts, tuple(map(tuple, examples)))


def _same_job(job: dict[str, Any], old: dict[str, Any], file: Path) -> None:
    for key, value in json.loads(json.dumps(job)).items():
        if key != "hint" and old.get(key) != value:
            raise InputError(f"{file} is of another job: its {key} is {old.get(key)}, not {value}; give another --out")
