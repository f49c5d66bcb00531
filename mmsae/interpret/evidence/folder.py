"""A folder of evidence: what an SAE's latents fire on in a corpus, as ``mmsae evidence`` writes it and all others read
it.

Files of a folder; ``M`` is a modality, n the number of items, d_sae that of latents, and all but the tables of items
lie in maps, of which only what is used is read::

    evidence.json           the job (SAE, host, sites, data, settings), counts, faults; see :class:`Evidence`
    items.parquet           one row per item, see :class:`Items`
    views.safetensors       item (e,), view (e, 4): where the host looks in items in evidence, see :class:`Items`
    stats.safetensors       M.fired_rows, M.fired_items, M.sum, M.sum_sq, M.max (d_sae,) and M.histogram (d_sae, bins)
    top.safetensors         M.value, M.item, M.position (d_sae, n_top), best first, item -1 where there are fewer
    examples.safetensors    M.positive (d_sae, quantiles, each), M.random, M.hard (d_sae, each): items, -1 for none;
                            M.eligible (d_sae,) 1 for latents that anything was drawn for
    codes-M.safetensors     start (n + 1,), latent, value, position: pooled codes of all items, row after row
    lists-M.safetensors     start (d_sae + 1,), item, value: the same, latent after latent
    tokens-M.safetensors    item (e,), grid (e, 2), start (e + 1,), latent, position, value: all rows of items in
                            evidence; grid has the rows and columns of each item's own places
    words-M.safetensors     item (e,), start (e + 1,), position, size, first (e + 1,), bytes: tokens of texts as they
                            read, where the rows of M are tokens; first says where an item's bytes begin
    thumbnails.safetensors  item (e,), start (e + 1,), bytes: small images of items in evidence, as WebP or JPEG
    embeddings.safetensors  M (n, width): unit embeddings of items by a host that has them
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmsae.interpret.evidence.options import Whereabouts
from mmsae.types import IMAGE, TEXT, InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

FORMAT = 1
ABOUT, ITEMS = "evidence.json", "items.parquet"
HALVES = ("train", "test")
BINS = 64
#: ``(BINS + 1,)`` edges of the histograms: equal steps of log10 of the absolute value, 1e-4 to 1e4; what lies outside
#: is counted in the first or last bin.
EDGES = np.logspace(-4, 4, BINS + 1)


class Items(NamedTuple):
    """The items of a corpus, column by column; all of length n."""

    uid: list[str]  #: Ids
    shard: list[str]  #: Names of the shards
    key: list[str]  #: Keys in the shards
    caption: list[str]  #: Captions, empty where there is none
    label: list[str]  #: Class names, empty where there is none
    #: Which half of the evidence an item belongs to: explanations see ``train``, scores see ``test``, by a hash of the
    #: uid.
    half: np.ndarray
    #: ``int32`` the item that this is a near-duplicate of in all modalities with codes, or -1: it adds nothing.
    copy_of: np.ndarray
    #: ``{modality: int32}`` the item whose image, or caption, this one's is a near-duplicate of, or -1; copies are no
    #: evidence in that modality, and their codes are kept.
    copies: dict[str, np.ndarray]
    #: ``(n, 4) float32`` where the host's view lies in the thumbnail, as shares of its width and height: left, top,
    #: right, bottom; it may reach beyond where the host pads. The whole for items in nobody's evidence.
    view: np.ndarray

    @property
    def n(self) -> int:
        """Number of items."""
        return len(self.uid)


class LatentStats(NamedTuple):
    """What is counted of d_sae latents in one modality, all ``(d_sae,)`` but the histogram."""

    fired_rows: np.ndarray  #: ``int64`` rows (tokens, patches, or items at a pooled site) in which a latent fires
    fired_items: np.ndarray  #: ``int64`` items in which it fires
    sum: np.ndarray  #: ``float64`` sum of its values over rows
    sum_sq: np.ndarray  #: ``float64`` sum of squares
    max: np.ndarray  #: ``float32`` largest absolute value
    histogram: np.ndarray  #: ``(d_sae, BINS) int64`` of the absolute values of rows in which it fires, by :data:`EDGES`

    @property
    def mean_active(self) -> np.ndarray:
        """Mean value over the rows in which a latent fires; 0 where it never does."""
        return self.sum / np.maximum(self.fired_rows, 1)


class TopItems(NamedTuple):
    """The items on which latents are largest, best first; every item once, near-duplicates left out."""

    value: np.ndarray  #: ``(d_sae, n_top) float32``
    item: np.ndarray  #: ``(d_sae, n_top) int32``, -1 where a latent has fewer
    position: np.ndarray  #: ``(d_sae, n_top) int32`` the row of the item with that value, see :class:`Grid`


class Grid(NamedTuple):
    """How the positions of rows lie in an item; ``position = (step * places) + place``."""

    #: Rows and columns of the patch grid over the host's view, or (0, 0) where places are no grid (texts, pooled
    #: sites). Where grids follow the shapes of images (Qwen-VL) these are the most of any item, and
    #: :meth:`Evidence.grid_of` has an item's own.
    rows: int
    cols: int
    places: int  #: Most places of an item: cells of its grid, tokens of the longest text, or 1
    steps: tuple[int, ...] = ()  #: Denoising steps, where an item was read at several; else empty


class SparseRows:
    """``(n, d_sae)`` pooled codes in a map: row after row (``codes``) or latent after latent (``lists``)."""

    def __init__(
        self, start: np.ndarray, index: np.ndarray, value: np.ndarray, width: int, position: np.ndarray | None = None
    ):
        self.start, self.index, self.value, self.width, self.position = start, index, value, width, position

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.start) - 1

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """``(index, value)`` of the entries of one row; indices ascend."""
        at = slice(int(self.start[i]), int(self.start[i + 1]))
        return self.index[at], self.value[at]

    def matrix(self, rows: Sequence[int] | np.ndarray | slice | None = None) -> csr_matrix:
        """``scipy.sparse.csr_matrix (n, width)`` of all rows (which shares the map), or a copy of some."""
        from scipy.sparse import csr_matrix

        whole = csr_matrix((self.value, self.index, self.start), shape=(self.n, self.width), copy=False)
        return whole if rows is None else whole[rows]


class ItemTokens(NamedTuple):
    """What fires in the rows of one item: entries sorted by latent, then position."""

    latent: np.ndarray  #: ``(m,) int32``
    position: np.ndarray  #: ``(m,) int32``, see :class:`Grid`
    value: np.ndarray  #: ``(m,) float32``


class TokenTable(NamedTuple):
    """What fires in the rows of all items in evidence; entry ``start[i]`` is the first of ``items[i]``."""

    items: np.ndarray  #: ``(e,) int32`` ascending
    start: np.ndarray  #: ``(e + 1,) int64``
    latent: np.ndarray  #: ``(m,) int32``, ascending within an item
    position: np.ndarray  #: ``(m,) int32``, see :class:`Grid`
    value: np.ndarray  #: ``(m,) float32``


class ItemWords(NamedTuple):
    """The tokens of an item's text as they read."""

    position: np.ndarray  #: ``(t,) int32`` ascending, as in :class:`ItemTokens`; special tokens are left out
    text: list[str]  #: t pieces, each with the white space before it: joined they are the text


class Evidence:
    """A folder of evidence.

    Args:
        folder: What ``mmsae evidence`` wrote.
        sae: Fingerprint of the SAE that it must be of; empty: any.
        host: Fingerprint of the host that it must be of; empty: any.
        where: Names of its hosts now, see :class:`~mmsae.interpret.evidence.hosts.NamedHost`.

    Attributes:
        about: ``evidence.json``: ``job`` with ``sae``, ``host`` (fingerprints), ``hint``, ``sites``, ``shards``,
            ``seed``, ``pool``; ``n_items``, ``d_sae``, ``modalities``, ``grid`` per modality, ``captions`` and
            ``images`` (whether there are any), ``embedder`` per modality, ``faults``.

    Raises:
        InputError: It is no folder of evidence, or of another SAE or host; the sentence says what differs.
    """

    def __init__(self, folder: str | Path, sae: str = "", host: str = "", where: Whereabouts = Whereabouts()):
        self.folder, self.where = Path(folder), where
        try:
            self.about: dict[str, Any] = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise InputError(
                f"{folder} is no folder of evidence: it has no readable {ABOUT} (mmsae evidence writes one)"
            ) from e
        if self.about.get("format", 0) > FORMAT:
            raise InputError(f"{folder} is evidence of format {self.about['format']}; this mmsae reads up to {FORMAT}")
        for what, asked in (("sae", sae), ("host", host)):
            if asked and asked != (found := self.about["job"][what]):
                raise InputError(f"{folder} is evidence of {what} {found[:12]}, not of {asked[:12]}: collect it again")

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.about["d_sae"]

    @property
    def n(self) -> int:
        """Number of items."""
        return self.about["n_items"]

    @property
    def modalities(self) -> list[str]:
        """Modalities with codes, ``image`` before ``text``."""
        return list(self.about["modalities"])

    def grid(self, modality: str) -> Grid:
        """How the positions of a modality lie in an item."""
        said = self.about["grid"][modality]
        return Grid(said["rows"], said["cols"], said["places"], tuple(said.get("steps", ())))

    @cached_property
    def items(self) -> Items:
        """The table of items."""
        import pyarrow.parquet as pq

        table = pq.read_table(self.folder / ITEMS)
        plain = {k: table[k].to_pylist() for k in ("uid", "shard", "key", "caption", "label")}
        copies = {m: table[f"copy_of_{m}"].to_numpy() for m in self.modalities}
        view, known = np.tile(np.float32([0, 0, 1, 1]), (len(table), 1)), self._map("views.safetensors")
        view[known["item"]] = known["view"]
        half = np.array(table["half"].to_pylist(), dtype="U5")
        return Items(**plain, half=half, copy_of=table["copy_of"].to_numpy(), copies=copies, view=view)

    def stats(self, modality: str) -> LatentStats:
        """Counts of all latents."""
        return LatentStats(**self._of("stats.safetensors", modality, LatentStats._fields))

    def top(self, modality: str) -> TopItems:
        """The items on which latents are largest."""
        return TopItems(**self._of("top.safetensors", modality, TopItems._fields))

    def codes(self, modality: str) -> SparseRows:
        """Pooled codes item by item: ``row(i)`` gives latents, values (and positions)."""
        t = self._map(f"codes-{modality}.safetensors")
        return SparseRows(t["start"], t["latent"], t["value"], self.d_sae, t["position"])

    def lists(self, modality: str) -> SparseRows:
        """Pooled codes latent by latent: ``row(j)`` gives the items on which latent j fires, and its values."""
        t = self._map(f"lists-{modality}.safetensors")
        return SparseRows(t["start"], t["item"], t["value"], self.n)

    def eligible(self, modality: str) -> np.ndarray:
        """``(d_sae,) bool`` latents that fire on enough items for examples to be drawn."""
        return self._map("examples.safetensors")[f"{modality}.eligible"].astype(bool)

    def positives(self, latent: int, modality: str, half: str) -> np.ndarray:
        """Items of one half drawn equally from the quantiles of a latent's values, the strongest quantile first."""
        return self._half(self._map("examples.safetensors")[f"{modality}.positive"][latent].ravel(), half)

    def negatives(self, latent: int, modality: str, half: str, kind: str = "random") -> np.ndarray:
        """Items of one half on which a latent is silent: drawn at random (``random``), or those most like the ones on
        which it fires (``hard``).
        """
        return self._half(self._map("examples.safetensors")[f"{modality}.{kind}"][latent], half)

    def examples(self, modality: str, half: str, kind: str = "positive") -> np.ndarray:
        """``(d_sae, m) int32`` items of one half for all latents at once, -1 behind the last of each: what
        :meth:`positives` (kind ``positive``) and :meth:`negatives` (``random``, ``hard``) give of one latent.
        """
        items = self.quantiles(modality, half) if kind == "positive" else self._table(modality, half, kind)
        items = items.reshape(len(items), -1)
        order = np.argsort(items < 0, 1, kind="stable")
        return np.take_along_axis(items, order, 1)

    def quantiles(self, modality: str, half: str = "") -> np.ndarray:
        """``(d_sae, quantiles, each) int32`` positives of one half by quantile, the strongest first; -1 for none. No
        half: of both.
        """
        return self._table(modality, half, "positive")

    def _table(self, modality: str, half: str, kind: str) -> np.ndarray:
        items = np.asarray(self._map("examples.safetensors")[f"{modality}.{kind}"])
        if not half:
            return items
        if half not in HALVES:
            raise InputError(f"half is {half!r}, it must be one of {', '.join(HALVES)}")
        return np.where((items >= 0) & (self.items.half == half)[items], items, -1)

    def _half(self, items: np.ndarray, half: str) -> np.ndarray:
        if half not in HALVES:
            raise InputError(f"half is {half!r}, it must be one of {', '.join(HALVES)}")
        items = np.asarray(items)
        items = items[items >= 0]
        return items[self.items.half[items] == half]

    def tokens(self, item: int, modality: str) -> ItemTokens | None:
        """What fires in the rows of an item, or None where it is in nobody's evidence."""
        t = self._map(f"tokens-{modality}.safetensors")
        if (i := _place(t, item)) is None:
            return None
        at = slice(int(t["start"][i]), int(t["start"][i + 1]))
        return ItemTokens(t["latent"][at], t["position"][at], t["value"][at])

    def all_tokens(self, modality: str) -> TokenTable:
        """What fires in the rows of all items in evidence, in the map."""
        t = self._map(f"tokens-{modality}.safetensors")
        return TokenTable(t["item"], t["start"], t["latent"], t["position"], t["value"])

    def words(self, item: int, modality: str = TEXT) -> ItemWords | None:
        """The words of an item's text at the positions of :meth:`tokens`, or None where its rows are no tokens of a
        text, or the item is in nobody's evidence.
        """
        t = self._map(f"words-{modality}.safetensors")
        if (i := _place(t, item)) is None:
            return None
        at = slice(int(t["start"][i]), int(t["start"][i + 1]))
        raw = t["bytes"][int(t["first"][i]) : int(t["first"][i + 1])].tobytes()
        ends = np.cumsum(t["size"][at])
        text = [raw[e - n : e].decode("utf-8") for e, n in zip(ends.tolist(), t["size"][at].tolist(), strict=True)]
        return ItemWords(t["position"][at], text)

    def grid_of(self, item: int, modality: str = IMAGE) -> tuple[int, int]:
        """Rows and columns of an item's own grid; (0, 0) where it has none or is in nobody's evidence."""
        t = self._map(f"tokens-{modality}.safetensors")
        i = _place(t, item)
        if i is None or "grid" not in t:
            grid = self.grid(modality)
            return (0, 0) if i is None else (grid.rows, grid.cols)
        return int(t["grid"][i, 0]), int(t["grid"][i, 1])

    def heat(self, item: int, latent: int, modality: str = IMAGE, step: int = 0) -> np.ndarray | None:
        """``(rows, cols) float32`` values of a latent on an item's patch grid, or None where there is no grid or the
        item is in nobody's evidence; ``step`` is a place in :attr:`Grid.steps`. Where several rows share a cell (tiles
        over the whole image) it is that of largest absolute value.
        """
        grid, tokens, (rows, cols) = self.grid(modality), self.tokens(item, modality), self.grid_of(item, modality)
        if tokens is None or not rows:
            return None
        on = np.flatnonzero((tokens.latent == latent) & (tokens.position // grid.places == step))
        on = on[np.argsort(np.abs(tokens.value[on]), kind="stable")]
        out = np.zeros(rows * cols, np.float32)
        out[tokens.position[on] % grid.places] = tokens.value[on]
        return out.reshape(rows, cols)

    def thumbnail(self, item: int) -> bytes | None:
        """The bytes of an item's small image (WebP or JPEG), or None where it has none."""
        t = self._map("thumbnails.safetensors")
        if (i := _place(t, item)) is None:
            return None
        return t["bytes"][int(t["start"][i]) : int(t["start"][i + 1])].tobytes()

    def embeddings(self, modality: str) -> np.ndarray | None:
        """``(n, width)`` unit embeddings of all items, or None where no host gave any; images and texts share a space
        where ``about["embedder"]`` names the same host for both.
        """
        return self._map("embeddings.safetensors").get(modality)

    def _of(self, file: str, modality: str, fields: Sequence[str]) -> dict[str, np.ndarray]:
        if modality not in self.modalities:
            raise InputError(f"{self.folder} has no {modality}: it is evidence of {', '.join(self.modalities)}")
        t = self._map(file)
        return {k: t[f"{modality}.{k}"] for k in fields}

    def _map(self, file: str) -> Mapping[str, np.ndarray]:
        if file not in self._maps:
            path = self.folder / file
            self._maps[file] = map_arrays(path) if path.exists() else {}
        return self._maps[file]

    @cached_property
    def _maps(self) -> dict[str, Mapping[str, np.ndarray]]:
        return {}


def _place(t: Mapping[str, np.ndarray], item: int) -> int | None:
    """Where an item is in a file of items in evidence; None where it is not."""
    if "item" not in t:
        return None
    i = int(np.searchsorted(t["item"], item))
    return i if i < len(t["item"]) and t["item"][i] == item else None


_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, in a read-only map of it: no byte is read before it is used."""
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    raw = np.memmap(path, np.uint8, "r")
    out = {}
    for name, said in header.items():
        if name != "__metadata__":
            lo, hi = (8 + size + v for v in said["data_offsets"])
            out[name] = raw[lo:hi].view(_TYPES[said["dtype"]]).reshape(said["shape"])
    return out
