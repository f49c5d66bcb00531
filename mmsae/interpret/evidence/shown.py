"""What is kept of the items in evidence alone: the codes of their rows, words, thumbnails, and where the host looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mmsae.interpret.evidence.corpus import CorpusItems
from mmsae.interpret.evidence.merge import ENTRIES, Writing
from mmsae.interpret.evidence.parts import ReadPart
from mmsae.types import TEXT

CODES = {"latent": np.int32, "position": np.int32, "value": np.float32}


class _Ragged:
    """Columns in which an item has any number of entries, and ``start`` that says where they begin."""

    def __init__(self, out: Writing, start: str = "start") -> None:
        self.out, self.name, self.total = out, start, 0
        out.append(start, np.zeros(1, np.int64))

    def add(self, size: np.ndarray, keep: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Add the entries of those items that are kept; ``size`` and ``keep`` are of all items of a part."""
        start = self.total + np.cumsum(size[keep], dtype=np.int64)
        self.total = int(start[-1]) if len(start) else self.total
        self.out.append(self.name, start)
        for name, column in columns.items():
            for values in _of_items(column, size, keep):
                self.out.append(name, values)


def write_tokens(folder: Path, corpus: CorpusItems, parts: Sequence[Path], wanted: np.ndarray) -> None:
    """``tokens-M``, ``words-M``, ``thumbnails`` and ``views`` of the items that are ``wanted (n,)``."""
    modalities = list(corpus.copies)
    words = [TEXT] if any("text.words.count" in ReadPart(p).arrays for p in parts) else []
    with ExitStack() as stack:
        small, views = (stack.enter_context(Writing(folder / f"{n}.safetensors")) for n in ("thumbnails", "views"))
        tokens = {m: stack.enter_context(Writing(folder / f"tokens-{m}.safetensors")) for m in modalities}
        said = {m: stack.enter_context(Writing(folder / f"words-{m}.safetensors")) for m in words}
        rows = {m: _Ragged(out) for m, out in tokens.items()}
        pieces = {m: (_Ragged(out), _Ragged(out, "first")) for m, out in said.items()}
        images = _Ragged(small)
        for path, first in zip(parts, corpus.first[:-1], strict=True):
            part = ReadPart(path)
            item = part.get("item").astype(np.int64) + first
            keep = wanted[item]
            kept = item[keep].astype(np.int32)
            views.append("item", kept)
            views.append("view", part.get("view", np.float32).reshape(-1, 4)[keep])
            size = part.get("thumbnail_size")
            shown = keep & (size > 0)
            small.append("item", item[shown].astype(np.int32))
            images.add(size, shown, {"bytes": part.get("thumbnail", np.uint8)})
            for m, ragged in rows.items():
                tokens[m].append("item", kept)
                tokens[m].append("grid", part.get(f"{m}.grid").reshape(-1, 2)[keep])
                ragged.add(part.get(f"{m}.count"), keep, {n: part.get(f"{m}.{n}", t) for n, t in CODES.items()})
            for m, (by_word, by_byte) in pieces.items():
                count, length = part.get(f"{m}.words.count"), part.get(f"{m}.words.size")
                said[m].append("item", kept)
                by_word.add(count, keep, {"position": part.get(f"{m}.words.position"), "size": length})
                ends = np.concatenate([[0], np.cumsum(length, dtype=np.int64)])[np.cumsum(count, dtype=np.int64)]
                by_byte.add(np.diff(ends, prepend=0), keep, {"bytes": part.get(f"{m}.words.bytes", np.uint8)})


def _of_items(column: np.ndarray, size: np.ndarray, keep: np.ndarray) -> Iterator[np.ndarray]:
    """The entries of some items, in stretches of bounded length."""
    if not len(size):
        yield column[:0]
    end, low = np.cumsum(size, dtype=np.int64), 0
    while low < len(size):
        begin = int(end[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(end, begin + ENTRIES, side="right")))
        yield column[begin : int(end[high - 1])][np.repeat(keep[low:high], size[low:high])]
        low = high
