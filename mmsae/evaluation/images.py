"""What a host gives for the images of shards: read from the host, or from a folder where it is kept.

A host takes far longer than an SAE, and its activations do not depend on the SAE: with a cache folder every image goes
through the host once, for all SAEs, controls and commands. One file holds what was asked of one tar, by uid; its name
says which tar (path, size and time of change), its folder which host, sites, transform and change of the images.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mmsae.activations.spool import Spool, map_safetensors, release
from mmsae.evaluation.options import EvaluationRun
from mmsae.files import disk_errors
from mmsae.hosts import Host
from mmsae.jobs.units import Share, TarWork, work_tars
from mmsae.shards import FaultLog, as_shard, identity, unit_batches
from mmsae.types import IMAGE, Faults, ImageTextBatch, InputError, Site

FORMAT = 1


class ImageRows(NamedTuple):
    """What a host gave for n images (or texts)."""

    uids: list[str]  #: The n sample ids
    x: Tensor  #: ``(N, d)`` float32 rows at the site, image after image
    item: Tensor  #: ``(N,)`` which of the n each row belongs to
    embed: Tensor | None = None  #: ``(n, e)`` the host's own embeddings where asked for, or None
    stats: Tensor | None = None  #: ``(n, 8)`` :func:`image_statistics`, or None for hosts with inputs of their own


class ImageChange(NamedTuple):
    """A change of images."""

    #: Applied to each batch of transformed images ``(B, 3, H, W)`` before the host sees them.
    apply: Callable[[Tensor], Tensor]
    name: str = ""  #: What it is, for the cache: what is changed without a name is not kept


@dataclass(frozen=True)
class HostPass:
    """Images through a host."""

    host: Host  #: The host
    site: Site  #: Where it is read
    modality: str = IMAGE  #: Modality of the site
    embed: bool = False  #: Whether its embeddings of images are asked for as well
    change: ImageChange | None = None  #: How images are changed before
    run: EvaluationRun = field(default_factory=EvaluationRun)  #: How to compute

    @property
    def batch_size(self) -> int:
        """Samples per forward pass."""
        return self.host.batch_size(self.run.batch_size)

    def stream(self, paths: Sequence[str]) -> Iterator[Any]:
        """Batches of the tars, each with its tar and whether it is the tar's last."""
        reading = self.host.reading({self.modality})
        pinned = self.host.device.type == "cuda"
        return unit_batches(
            paths, batch_size=self.batch_size, workers=self.run.workers, pin_memory=pinned, **reading
        )  # fmt: skip

    @torch.no_grad()
    def look(self, batch: ImageTextBatch) -> ImageRows:
        """Run the host.

        Raises:
            InputError: Images are to be changed, and the host has inputs of its own.
        """
        batch = self.host.prepared(batch, "cpu")
        if self.change is not None:
            if batch.images is None:
                raise InputError(f"host {self.host.hint} has no plain images to change: give shards instead")
            batch = batch._replace(images=self.change.apply(batch.images))
        got = self.host.read(batch, [self.site, *(["image.embed"] if self.embed else [])])
        x, item = got[0].x.float().cpu(), got[0].item.cpu()
        order = item.argsort(stable=True)
        return ImageRows(
            list(batch.uids), x[order], item[order], got[1].x.float().cpu() if self.embed else None,
            None if batch.images is None else image_statistics(batch.images),
        )  # fmt: skip

    def key(self, wanted: set[str]) -> str:
        """What a kept file depends on beside its tar; a change may depend on the whole batch."""
        transform = re.sub(r" at 0x[0-9a-f]+", "", repr(self.host.reading({self.modality})["transform"]))
        site, host = self.site, self.host
        said: list[Any] = [FORMAT, host.fingerprint, host.precision, host.device.type, transform]
        said += [site.module, site.io, site.tokens, self.modality]
        if self.change is not None:
            said += [self.change.name, self.batch_size, sorted(wanted)]
        return _hash(said)


def read_images(asked: HostPass, paths: Sequence[str], wanted: set[str], desc: str = "features") -> Iterator[ImageRows]:
    """What the host gives for the samples of some tars whose uids are wanted, tar after tar.

    Raises:
        InputError: Too many samples are unusable, or the disk is full.
    """
    log = FaultLog()
    with tqdm(desc=desc, unit="image", total=len(wanted), disable=not asked.run.progress) as bar:
        keeps = asked.run.cache and (asked.change is None or asked.change.name)
        found = _kept(asked, paths, wanted, log) if keeps else _straight(asked, paths, wanted, log)
        for rows in found:
            yield rows
            bar.update(len(rows.uids))
    log.check(asked.run.fault_limit, final=True)


def _straight(asked: HostPass, paths: Sequence[str], wanted: set[str], log: FaultLog) -> Iterator[ImageRows]:
    with closing(asked.stream(paths)) as stream:
        for unit in stream:
            log.merge(unit.batch.faults)
            log.check(asked.run.fault_limit)
            if batch := _picked(unit.batch, wanted):
                yield asked.look(batch)


def _kept(asked: HostPass, paths: Sequence[str], wanted: set[str], log: FaultLog) -> Iterator[ImageRows]:
    """The host runs over what is not kept yet, then everything is read from the files."""
    cache, run, embed = Path(asked.run.cache), asked.run, asked.embed
    folder = cache / asked.key(wanted)
    with disk_errors(cache):
        folder.mkdir(parents=True, exist_ok=True)
    parts = {p: KeptTar.open(_file(folder, p), embed) for p in paths}
    lacking = [p for p, part in parts.items() if part is None or (part.good & wanted) - set(part.uids)]
    # a file has embeddings for all its samples or for none
    if any(parts[p] and "embed" in parts[p].tensors for p in lacking):
        asked = replace(asked, embed=True)
        parts |= {p: KeptTar.open(_file(folder, p), embed=True) for p in lacking}
    if lacking:
        what, share = f"the host runs over {len(lacking)} of {len(paths)} shards", Share(list(range(len(lacking))))
        with disk_errors(cache):
            work_tars(
                asked.stream(lacking), lambda p: KeptTarWriter(_file(folder, p), parts[p], asked, wanted), share, what,
                run.fault_limit, run.progress,
            )  # fmt: skip
    for path in paths:
        part = KeptTar.open(_file(folder, path))
        log.merge(part.faults)
        log.check(run.fault_limit)
        for rows in part.batches(wanted, asked.batch_size):
            yield rows if embed else rows._replace(embed=None)


def _picked(batch: ImageTextBatch, wanted: set[str]) -> ImageTextBatch | None:
    """The samples that are asked for; hosts with inputs of their own get whole batches (rows are chosen later)."""
    at = [i for i, u in enumerate(batch.uids) if u in wanted]
    if not at or batch.images is None or len(at) == len(batch.uids):
        return batch if at else None
    return batch._replace(images=batch.images[at], uids=[batch.uids[i] for i in at])


class KeptTar(NamedTuple):
    """What is kept of one tar."""

    uids: list[str]  #: Uids of the samples that went through the host
    good: set[str]  #: Uids of all usable samples of the tar
    faults: Faults  #: Faults of the tar
    #: ``x``, ``count`` (rows per sample), and ``embed`` and ``stats`` where there are any.
    tensors: Mapping[str, Tensor]
    map: Any  #: The file's map

    @classmethod
    def open(cls, file: Path, embed: bool = False) -> KeptTar | None:
        """The part in a file; None where there is none, or one without the embeddings that are asked for."""
        if not file.exists():
            return None
        mapped, tensors = map_safetensors(file)
        if embed and "x" in tensors and "embed" not in tensors:
            return None
        about = json.loads(tensors["about"].numpy().tobytes())
        return cls(about["uids"], set(about["good"]), Faults(*about["faults"]), tensors, mapped)

    def batches(self, wanted: set[str], size: int) -> Iterator[ImageRows]:
        """The wanted samples, ``size`` at a time."""
        at = torch.tensor([i for i, u in enumerate(self.uids) if u in wanted], dtype=torch.long)
        if not len(at):
            return
        count = self.tensors["count"].long()
        start = count.cumsum(0) - count
        for some in at.split(size):
            n = count[some]
            item = torch.repeat_interleave(torch.arange(len(some)), n)
            row = torch.arange(len(item)) + (start[some] - n.cumsum(0) + n)[item]
            embed, stats = (self.tensors[k][some] if k in self.tensors else None for k in ("embed", "stats"))
            yield ImageRows([self.uids[i] for i in some.tolist()], self.tensors["x"][row], item, embed, stats)
            release(self.map)


class KeptTarWriter(TarWork):
    """Writes a :class:`KeptTar`: the rows of an earlier one, and what the host gives for other wanted samples."""

    def __init__(self, file: Path, old: KeptTar | None, asked: HostPass, wanted: set[str]) -> None:
        self.spool, self.asked, self.uids, self.good = Spool(file), asked, [], []
        held = set(old.uids) if old else set()
        self.wanted = wanted - held
        for rows in old.batches(held, 64) if old else ():
            self._append(rows)

    def add(self, batch: ImageTextBatch, log: FaultLog) -> None:
        self.good += batch.uids
        if picked := _picked(batch, self.wanted):
            self._append(self.asked.look(picked))

    def _append(self, rows: ImageRows) -> None:
        self.uids += rows.uids
        self.spool.append("x", rows.x)
        self.spool.append("count", torch.bincount(rows.item, minlength=len(rows.uids)).int())
        for name in ("embed", "stats"):
            if (values := getattr(rows, name)) is not None:
                self.spool.append(name, values)

    def finish(self, faults: FaultLog) -> None:
        said = {"uids": self.uids, "good": self.good, "faults": list(faults.take())}
        self.spool.append("about", torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8))
        self.spool.finish()

    def close(self) -> None:
        self.spool.close()


def _file(folder: Path, path: str) -> Path:
    shard = as_shard(path)
    if shard.found is None:
        now = Path(path).stat()
        known = [shard.name, str(Path(path).resolve()), now.st_size, now.st_mtime_ns]  # uids have the name
    else:
        known = [str(shard), *identity([shard])[0]]
    return folder / f"{Path(shard.file).name}-{_hash(known)}.safetensors"


def _hash(said: Any) -> str:
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=12).hexdigest()


def image_statistics(images: Tensor) -> Tensor:
    """``(B, 8)`` of images ``(B, 3, H, W)``: mean and spread of each channel, mean step between neighbours both ways.

    What a trivial detector sees: brightness, contrast, colour, and sharpness (which tells resolution and JPEG).
    """
    x = images.detach().float().cpu()
    steps = [(x.diff(dim=d)).abs().mean((1, 2, 3)) for d in (2, 3)]
    return torch.cat([x.mean((2, 3)), x.std((2, 3)), torch.stack(steps, 1)], 1)
