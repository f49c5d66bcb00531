"""What an activation store says about itself: one JSON file, written last.

A store is an immutable folder::

    spec.json                  this file; a folder without it is not a store, however complete it looks
    shard-00000.safetensors    the rows of one unit of work (one source tar), one tensor per site
    shard-00000.parquet        its items: uid, key, caption
    shard-00001.safetensors    ...

Tensors in a shard are called after their site: ``image`` is ``(rows, d)``. Sites with several rows per item add
``image.item`` (int32 row -> item of the shard; rows of an item are contiguous and items ascend) and, where the host
knows them, ``image.position`` (int32) and ``image.special`` (uint8). Where a loss of the host was differentiated, which
``job`` names as ``gradient``, ``image.grad`` holds the derivatives by the rows, in their shape and type.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmsae.types import InputError, Site

FORMAT, FORMAT_VERSION = "mmsae.activations", 1
SPEC_FILE, JOB_FILE = "spec.json", "job.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def shard_stem(i: int) -> str:
    """``shard-00007``: the place of the source tar in the sorted list, never a rank or worker number."""
    return f"shard-{i:05d}"


def digest(data: bytes | memoryview) -> str:
    """Hex blake2b-256."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def site_label(site: Site) -> str:
    """``MODULE:IO[TOKENS]``, the form in which sites are asked for."""
    return f"{site.module}:{site.io}[{site.tokens}]"


def name_sites(sites: list[Site]) -> dict[str, Site]:
    """Names for the sites of a store: the modality, or ``modality/LABEL`` where one modality has several."""
    per = [s.modality for s in sites]
    names = [s.modality if per.count(s.modality) == 1 else f"{s.modality}/{site_label(s)}" for s in sites]
    if len(set(names)) < len(names):
        raise InputError(f"sites: the same site is given twice among {', '.join(names)}")
    return dict(zip(names, sites, strict=True))


@dataclass(frozen=True)
class ShardInfo:
    """One line of the shard table."""

    source: str  #: File name of the tar the rows came from; empty where there was none.
    items: int  #: Number of items (uids).
    rows: dict[str, int]  #: ``{site name: rows}``.
    bytes: dict[str, int]  #: ``{"safetensors": size, "parquet": size}``.
    hashes: dict[str, str]  #: ``{"safetensors": blake2b, "parquet": blake2b}`` of the files.


@dataclass(frozen=True)
class StoreSpec:
    """The description of a whole store."""

    sites: dict[str, Site]  #: ``{site name: Site}``; the name is the modality where each modality has one site.
    dtype: str  #: ``float32``, ``float16`` or ``bfloat16``, of all activations.
    shards: list[ShardInfo]  #: The shard table, in the order of the source tars.
    #: What was asked for (host fingerprint and hint, batch size, precision, names of the source tars ...).
    job: dict[str, Any] = field(default_factory=dict)
    #: Totals of what was dropped while reading: ``{"seen": n, "counts": {kind: n}, "examples": [...]}``.
    faults: dict[str, Any] = field(default_factory=dict)
    created_by: str = ""  #: ``mmsae VERSION``; not part of the hash.
    #: blake2b-256 over everything above, and through the shard table over every byte of the data.
    content_hash: str = ""

    @property
    def items(self) -> int:
        """Number of items (uids)."""
        return sum(s.items for s in self.shards)

    @property
    def rows(self) -> dict[str, int]:
        """``{site name: rows}``."""
        return {n: sum(s.rows[n] for s in self.shards) for n in self.sites}

    @property
    def nbytes(self) -> int:
        """Size of all data files in bytes."""
        return sum(sum(s.bytes.values()) for s in self.shards)

    @property
    def modalities(self) -> list[str]:
        """The modalities, in the order in which they were stored."""
        return list(dict.fromkeys(s.modality for s in self.sites.values()))

    def pooled(self, name: str) -> bool:
        """Whether row i of this site belongs to item i (in every shard)."""
        return not has_item_column(self.sites[name])

    def resolve(self, site: str | Site | None = None, modality: str | None = None) -> str:
        """The name of the one stored site of a modality (None: any) that is meant.

        ``site`` is a :class:`Site`, a site name of this store, a label ``MODULE:IO[TOKENS]`` or a module; None: any.

        Raises:
            InputError: None or several match.
        """

        def match(name: str, s: Site) -> bool:
            if modality is not None and s.modality != modality:
                return False
            return site is None or (s.same(site) if isinstance(site, Site) else site in (name, site_label(s), s.module))

        found = [n for n, s in self.sites.items() if match(n, s)]
        if len(found) == 1:
            return found[0]
        wanted = {"site": site, "modality": modality}
        want = " and ".join(f"{k} {v}" for k, v in wanted.items() if v is not None) or "a site"
        have = ", ".join(f"{n} ({site_label(s)})" for n, s in self.sites.items())
        raise InputError(f"{want}: the store holds {len(found)} sites of that description, 1 is needed; it has {have}")

    def own(self, modality: str, sites: Mapping[str, Site]) -> str:
        """The name of the one site of a modality; of several, that at which an SAE with these ``sites`` was trained."""
        several = sum(s.modality == modality for s in self.sites.values()) > 1
        return self.resolve(sites.get(modality) if several else None, modality)

    def choose(self, sites: Mapping[str, str | Site] | str | None = None) -> dict[str, str]:
        """``{modality: site name}``, one per modality; ``sites`` says which where there are several, or the one."""
        if isinstance(sites, str):
            name = self.resolve(sites)
            return {self.sites[name].modality: name}
        sites = sites or {}
        for m in sites:
            if m not in self.modalities:
                raise InputError(f"sites: the store has no modality {m}; it has {', '.join(self.modalities)}")
        return {m: self.resolve(sites.get(m), m) for m in (sites or self.modalities)}

    def d_in(self, sites: Mapping[str, str | Site] | str | None = None) -> int | dict[str, int]:
        """Feature width: one number where the modalities agree, else ``{modality: width}``."""
        widths = {m: self.sites[n].width for m, n in self.choose(sites).items()}
        return next(iter(widths.values())) if len(set(widths.values())) == 1 else widths

    def hash(self) -> str:
        """What ``content_hash`` has to be."""
        return digest(json.dumps(self._body(), sort_keys=True, separators=(",", ":")).encode())

    def _body(self) -> dict[str, Any]:
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, "dtype": self.dtype, "items": self.items}
        body |= {"rows": self.rows, "sites": {n: s.to_dict() for n, s in self.sites.items()}, "job": self.job}
        return body | {"faults": self.faults, "shards": [asdict(s) for s in self.shards]}

    def to_json(self) -> str:
        """The text of ``spec.json``."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "created_by": self.created_by}
        return json.dumps(head | {"content_hash": self.hash()} | self._body(), indent=1) + "\n"

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> StoreSpec:
        """Read and check ``spec.json`` of a store folder; reads no activation.

        Raises:
            InputError: There is no store, it is unfinished, newer than this version, damaged or changed by hand.
        """
        if not str(folder):
            raise InputError("no activation store is given: set --data.store to a folder written by mmsae extract")
        folder = Path(folder)
        path = folder / SPEC_FILE
        if not path.is_file():
            raise InputError(_why_not_a_store(folder))
        try:
            raw = json.loads(path.read_text())
            version = raw["format_version"] if raw["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path}: not the spec of an activation store ({type(e).__name__}: {e})") from e
        if version is None:
            raise InputError(f"{path}: format is {raw['format']!r}, an activation store has {FORMAT!r}")
        if version > FORMAT_VERSION:
            raise InputError(
                f"{path}: format version {version} is newer than {FORMAT_VERSION}, the newest this mmsae can read"
            )
        try:
            shards = [ShardInfo(**s) for s in raw["shards"]]
            said = {k: raw[k] for k in ("dtype", "job", "faults", "created_by", "content_hash")}
            spec = cls(sites={n: Site(**s) for n, s in raw["sites"].items()}, shards=shards, **said)
            actual = spec.hash()
        except (KeyError, TypeError) as e:
            raise InputError(f"{path}: the spec is damaged ({type(e).__name__}: {e})") from e
        if actual != spec.content_hash:
            raise InputError(
                f"{path}: content hash is {spec.content_hash[:16]}, but what the file says hashes to {actual[:16]}: "
                "it was changed after it was written"
            )
        return spec

    def check_sizes(self, folder: str | os.PathLike[str]) -> None:
        """Compare every file's size with the table: the cheap check, made whenever a store is opened.

        Raises:
            InputError: A file is missing or has another size.
        """
        for i, s in enumerate(self.shards):
            for kind, size in s.bytes.items():
                path = Path(folder) / f"{shard_stem(i)}.{kind}"
                actual = path.stat().st_size if path.is_file() else None
                if actual != size:
                    found = "is missing" if actual is None else f"has {actual} bytes"
                    raise InputError(f"{path}: {found}, the store's spec says {size} bytes")


def has_item_column(site: Site) -> bool:
    """Whether a site has several rows per item, so that its shards carry an ``item`` column."""
    # "content" and "pad" are of text encoders, the last three of LVLMs
    return site.tokens in ("patches", "all", "mask", "content", "pad", "image", "text", "text_all")


def _why_not_a_store(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: there is no such folder; an activation store is written by mmsae extract --out {folder}"
    job = folder / JOB_FILE
    if job.is_file():
        done = len(list(folder.glob("shard-*.parquet")))
        total = json.loads(job.read_text()).get("units", "?")
        return f"{folder}: unfinished, {done} of {total} shards are done; run the same mmsae extract again to finish it"
    return f"{folder}: not an activation store, it has no {SPEC_FILE}"
