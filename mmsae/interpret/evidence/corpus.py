"""The items of a job, from the parts of its tars: who they are, which half they are in, which are copies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmsae.interpret.evidence.copies import common_groups, equal_groups, first_of_group, near_groups
from mmsae.interpret.evidence.marks import CELLS
from mmsae.interpret.evidence.parts import ReadPart
from mmsae.shards import FaultLog
from mmsae.types import IMAGE, Faults, InputError


class CorpusItems(NamedTuple):
    """The n items of a job in the order of its tars; what is large (captions, codes) stays in the parts."""

    paths: list[Path]  #: The parts
    first: np.ndarray  #: ``(parts + 1,)`` number of each part's first item
    rank: np.ndarray  #: ``(n,) int32`` place of an item in the order of uids
    draw: np.ndarray  #: ``(n,) float64`` a number in [0, 1) by its uid
    copies: dict[str, np.ndarray]  #: ``{modality: (n,) int32}`` what it is a near-duplicate of, or -1
    copy_of: np.ndarray  #: ``(n,) int32`` the same in all modalities at once
    grid: dict[str, tuple[int, int]]  #: The largest rows and columns, by modality
    places: dict[str, int]  #: By modality
    faults: FaultLog  #: Of all tars

    @property
    def n(self) -> int:
        """Number of items."""
        return int(self.first[-1])

    @property
    def test(self) -> np.ndarray:
        """``(n,) bool`` whether an item is in the test half."""
        return self.draw >= 0.5

    def parts(self):
        """The parts, each with the number of its first item."""
        for path, first in zip(self.paths, self.first[:-1], strict=True):
            yield ReadPart(path), int(first)

    @classmethod
    def read(cls, paths: Sequence[Path], modalities: Sequence[str]) -> CorpusItems:
        """Of the ``codes`` parts of all tars.

        Raises:
            InputError: A uid occurs twice, or there is no item.
        """
        log, uids, first = FaultLog(), [], [0]
        grid, places = {}, dict.fromkeys(modalities, 1)
        columns: dict[str, list[np.ndarray]] = {k: [] for k in ("draw", "dhash", "has_image", "text")}
        empty = {"draw": np.float64, "dhash": np.int64, "has_image": np.uint8, "text": np.int64}
        for path in paths:
            part = ReadPart(path)
            about = part.about()
            log.merge(Faults.read(about["faults"]))
            uids.append(np.frombuffer(bytes.fromhex("".join(about["uid"])), "V16"))
            first.append(first[-1] + len(about["uid"]))
            grid = {m: tuple(map(max, zip(grid.get(m, (0, 0)), g, strict=True))) for m, g in about["grid"].items()}
            places = {m: max(p, about["places"][m]) for m, p in places.items()}
            for name, found in columns.items():
                found.append(np.array(part.get(name, empty[name])))
        if not first[-1]:
            raise InputError(f"no sample was usable: {log.drops()}" if log.n_seen else "the shards hold no sample")
        uid = np.concatenate(uids).view(">u8").reshape(-1, 2)
        order = np.lexsort((uid[:, 1], uid[:, 0]))
        twice = np.flatnonzero((uid[order][1:] == uid[order][:-1]).all(1))
        if len(twice):
            raise InputError(f"uid {uid[order[twice[0]]].tobytes().hex()} occurs twice: uids must differ")
        rank = np.empty(len(uid), np.int32)
        rank[order] = np.arange(len(uid))
        made = {k: np.concatenate(v) for k, v in columns.items()}
        signature = PartRows(paths, np.array(first), "signature", (CELLS, CELLS, 3), np.uint8)
        groups = {}
        for m in modalities:
            if m == IMAGE:
                groups[m] = near_groups(made["dhash"], signature, made["has_image"])
            else:
                groups[m] = equal_groups(made["text"])
        copies = {m: first_of_group(g, rank) for m, g in groups.items()}
        copy_of = first_of_group(common_groups(list(groups.values())), rank)
        return cls(list(paths), np.array(first), rank, made["draw"], copies, copy_of, grid, places, log)


class PartRows:
    """A column of all parts as one array that is read by its rows."""

    def __init__(self, paths: Sequence[Path], first: np.ndarray, name: str, tail: tuple[int, ...], dtype: type):
        self.first, self.tail, self.dtype = first, tail, dtype
        self.columns = [ReadPart(p).get(name, dtype).reshape(-1, *tail) for p in paths]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        out = np.empty((len(rows), *self.tail), self.dtype)
        part = np.searchsorted(self.first, rows, side="right") - 1
        for p in np.unique(part):
            at = part == p
            out[at] = self.columns[p][rows[at] - self.first[p]]
        return out
