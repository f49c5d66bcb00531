"""The data of one SAE in a browser: a table of all latents, and shards that a page loads when it shows them."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmsae.interpret.browser import relations
from mmsae.interpret.browser.areas import ShownAreas
from mmsae.interpret.browser.exports import feature_lines
from mmsae.interpret.browser.files import PACK, SHARD, indices, packed, put, share_of
from mmsae.interpret.browser.layout import layout
from mmsae.interpret.browser.maps import MapLimits, map_limits, pair_maps, sample_maps
from mmsae.interpret.browser.options import Display
from mmsae.interpret.browser.segments import bisect
from mmsae.interpret.browser.shown import choose, strongest
from mmsae.interpret.browser.vectors import latent_vectors
from mmsae.interpret.browser.words import caption_words
from mmsae.interpret.evidence.folder import BINS, Evidence
from mmsae.metrics.concepts.names import LatentName
from mmsae.types import IMAGE

CARD = 6  # images and texts of a latent in lists


class Source(NamedTuple):
    """What a panel is made of."""

    id: str  #: ``main``, ``other`` or ``control``: the folder of its data, and part of links
    title: str  #: Shown in the switch between panels
    evidence: Evidence  #: Its evidence
    atoms: np.ndarray | None  #: ``(d_sae, d)`` atoms of the SAE, or None where it is not at hand
    names: Mapping[int, LatentName]  #: Names, where there are any
    scores: Mapping[str, Any]  #: ``columns {name: (d_sae,)}``, ``rows`` per latent and ``summary``; empty: none
    control: bool = False  #: Whether it is a control, of random weights


class Panel:
    """Writes the data of one SAE.

    Args:
        source: What it is made of.
        display: What is shown.
        folder: ``data`` of the browser.
    """

    def __init__(self, source: Source, display: Display, folder: Path):
        self.source, self.display, self.folder = source, display, folder
        self.evidence, self.d_sae = source.evidence, source.evidence.d_sae
        self.shown = choose(source.evidence, display)
        self.stats = {m: source.evidence.stats(m) for m in source.evidence.modalities}
        self.notes: list[str] = []  #: What is not as it was asked for, once written
        self.bytes = {"latents": 0, "samples": 0, "images": 0, "maps": 0}
        self.words: list[list[tuple[str, int]]] = []  #: Of every latent, once written
        self.near: dict[str, tuple[np.ndarray, np.ndarray]] = {}  #: Neighbours, once written
        self.table: dict[str, np.ndarray] = {}  #: Columns, once written
        self.areas: ShownAreas | None = None  #: Numbers of areas, while written and where patches are known
        self.lifted: dict[str, Any] | None = None  #: Three labels of every latent, once written and where there are any

    @cached_property
    def living(self) -> np.ndarray:
        """``(d_sae,)`` bool: fires in some modality."""
        return np.any([s.fired_items > 0 for s in self.stats.values()], 0)

    @cached_property
    def labels(self) -> tuple[list[str], np.ndarray]:
        """Names of labels, and the number of each item's, -1 for none."""
        said = self.evidence.items.label
        names = sorted(set(said) - {""})
        number = {name: i for i, name in enumerate(names)} | {"": -1}
        return names, np.array([number[x] for x in said], np.int32)

    @cached_property
    def codes(self) -> dict[str, Any]:
        """``{modality: (m, d_sae)}`` codes of the shown items, cut."""
        return {m: strongest(self.evidence, m, self.shown.item, self.display.codes) for m in self.stats}

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """What the table has of every latent."""
        out: dict[str, np.ndarray] = {}
        for m, s in self.stats.items():
            out |= {
                f"{m}.n": s.fired_items.astype(np.int32),
                f"{m}.density": (s.fired_items / max(self.evidence.n, 1)).astype(np.float32),
                f"{m}.mean": s.mean_active.astype(np.float32),
                f"{m}.max": s.max.astype(np.float32),
            }
        if {"image", "text"} <= set(self.stats):
            out |= {"modality": relations.modality_index(self.evidence), "agree": relations.agreement(self.evidence)}
        return out | dict(self.source.scores.get("columns", {}))

    def write(self) -> dict[str, Any]:
        """Write everything; returns what ``site.js`` says about the panel."""
        about, source, display = self.evidence.about, self.source, self.display
        columns = dict(self.columns)
        how = "none"
        if source.atoms is not None and display.layout != "none":
            place, how = layout(source.atoms, self.living, display.layout, display.seed)
            columns |= {"x": place[:, 0], "y": place[:, 1]}
        if source.atoms is None and not source.control:
            self.notes.append("there is no map, and no neighbours by atoms: no SAE is at hand (--sae, --other-sae)")
        captions = [self.evidence.items.caption[i] for i in self.shown.item]
        tops = {m: self._numbers(p[:, : self.shown.top]) for m, p in self.shown.pairs.items()}
        self.words = caption_words(captions, list(tops.values()))
        if display.maps and IMAGE in self.stats and self.evidence.grid(IMAGE).rows:
            said = {j: n.name for j, n in source.names.items() if n.name and 0 <= j < self.d_sae}
            self.areas = ShownAreas(self.evidence, self.shown.number, said)
            self.bytes["latents"] += put(self.folder, f"{source.id}/together", self.areas.names())
        purest = self._shards()
        if purest is not None:
            columns |= purest
        key = source.id
        kinds = {k: "i4" if np.issubdtype(v.dtype, np.integer) else "f4" for k, v in columns.items()}
        size = put(self.folder, f"{key}/table", {k: packed(v, kinds[k]) for k, v in columns.items()})
        named = [[j, *_plain(n)] for j, n in sorted(source.names.items()) if 0 <= j < self.d_sae]
        said = [n.name for n in source.names.values() if n.name]
        if vectors := latent_vectors(self.evidence, source.atoms, display.vocabulary, said):
            if note := vectors["words"].pop("note"):
                self.notes.append(f"the search by words goes by those of captions: {note}")
            size += put(self.folder, f"{key}/vectors", vectors)
        words = "\n".join(" ".join(w for w, _ in x) for x in self.words)  # one text: a web browser reads it at once
        size += put(self.folder, f"{key}/names", {"names": named, "words": words, "labels": self.lifted})
        size += put(self.folder, f"{key}/tops", {m: indices(t[:, :CARD], self.shown.m) for m, t in tops.items()})
        self.bytes["latents"] += size
        self._packs(captions)
        maps = self._maps()
        self._searched(captions)
        labels, _ = self.labels
        meta = {
            "id": key, "title": source.title, "control": source.control, "sae": about["job"]["sae"],
            "host": about["job"]["host"], "job": about["job"], "faults": about.get("faults", {}),
            "d_sae": self.d_sae, "n": self.evidence.n, "modalities": list(self.stats),
            "grid": {m: self.evidence.grid(m)._asdict() for m in self.stats}, "shown": self.shown.m,
            "top": self.shown.top, "quantiles": dict(self.shown.quantiles), "shard": SHARD, "pack": PACK,
            "codes": display.codes, "maps": maps, "areas": self.areas is not None, "captions": bool(about["captions"]),
            "images": bool(about["images"]) and display.images != "none", "layout": how, "labels": labels,
            "living": int(self.living.sum()), "named": sum(bool(n.name) for n in source.names.values()),
            "scores": source.scores.get("summary", []), "bytes": self.bytes, "vectors": (vectors or {}).get("of"),
        }  # fmt: skip
        put(self.folder, f"{key}/meta", meta)
        self.table = columns
        return {"id": key, "title": source.title, "control": source.control, "sae": about["job"]["sae"]}

    def _numbers(self, items: np.ndarray) -> np.ndarray:
        return np.where(items >= 0, self.shown.number[items], -1)

    def _shards(self) -> dict[str, np.ndarray] | None:
        """Write latents and inverted lists, shard by shard; returns the columns of the purest label, or None."""
        self.near = near = self._near()
        by_latent = {m: abs(c).tocsc() for m, c in self.codes.items()}
        names, label = self.labels
        purest = {
            "label": np.full(self.d_sae, -1, np.int32),
            "purity": np.full(self.d_sae, np.nan, np.float32),
        }
        lifted = np.full((self.d_sae, 3), -1, np.int32)
        for lo in range(0, self.d_sae, SHARD):
            rows = slice(lo, min(lo + SHARD, self.d_sae))
            record: dict[str, Any] = {k: {"to": indices(i[rows], self.d_sae), "value": packed(v[rows], "f4")}
                                      for k, (i, v) in near.items()}  # fmt: skip
            record["words"] = self.words[rows]
            record["scores"] = [self.source.scores.get("rows", {}).get(j, []) for j in range(rows.start, rows.stop)]
            lists = {}
            for m in self.stats:
                record[m] = self._examples(m, rows)
                if names:
                    lift = relations.label_lift(self.evidence.lists(m), rows, label, names)
                    record[m]["lift"] = {
                        "label": indices(lift["label"], len(names)),
                        "count": packed(lift["count"].astype(np.int32)),
                        "share": packed(lift["share"], "f4"),
                        "lift": packed(lift["lift"], "f4"),
                    }
                    better = ~(lift["share"][:, 0] <= purest["purity"][rows]) & (lift["label"][:, 0] >= 0)
                    purest["label"][rows] = np.where(better, lift["label"][:, 0], purest["label"][rows])
                    purest["purity"][rows] = np.where(better, lift["share"][:, 0], purest["purity"][rows])
                    top = np.where((lift["count"] > 0) & (lift["lift"] > 1), lift["label"], -1)[:, :3]
                    lifted[rows, : top.shape[1]] = np.where(better[:, None], top, lifted[rows, : top.shape[1]])
                lists[m] = self._list(m, by_latent[m], rows)
            if self.areas:
                lists["areas"] = self.areas.of(rows)
            number = lo // SHARD
            self.bytes["latents"] += put(self.folder, f"{self.source.id}/latents/{number}", record)
            self.bytes["latents"] += put(self.folder, f"{self.source.id}/lists/{number}", lists)
        self.lifted = indices(lifted, len(names)) if names else None
        return purest if names else None

    def _near(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Neighbours of every latent, by name of the relation."""
        k, seed, atoms, out = self.display.neighbours, self.display.seed, self.source.atoms, {}
        if atoms is not None:
            out["near"] = relations.nearest_rows(atoms, atoms, k, same=True, allowed=self.living)
        for m in self.stats:
            codes = self.evidence.codes(m)
            out[f"co.{m}"] = relations.coactive(codes.matrix(relations.sample_rows(codes, seed)), k)
        if {"image", "text"} <= set(self.stats):
            image, text = self.evidence.codes("image"), self.evidence.codes("text")
            some = relations.sample_rows(image, seed, other=text)
            out["bridge"] = relations.bridges(image.matrix(some), text.matrix(some), atoms, k)
        return out

    def _examples(self, modality: str, rows: slice) -> dict[str, Any]:
        """Items, values and maps of the latents of a shard in one modality."""
        stats = self.stats[modality]
        pairs = self.shown.pairs[modality][rows]
        has, most = pairs >= 0, stats.max[rows]
        latent = np.broadcast_to(np.arange(rows.start, rows.stop)[:, None], pairs.shape)
        lists = self.evidence.lists(modality)
        at = bisect(lists.start, lists.index, latent[has], pairs[has])
        value = np.zeros(pairs.shape, np.float32)
        value[has] = lists.value[at]
        histogram = np.asarray(stats.histogram[rows], np.float64)
        used = np.flatnonzero(histogram.any(0))
        lo, hi = (used[0], used[-1] + 1) if len(used) else (0, 1)
        tall = np.maximum(histogram.max(1, keepdims=True), 1)
        out = {
            "item": indices(self._numbers(pairs), self.shown.m),
            "value": share_of(value, most[:, None], "i2"),
            "rows": packed(stats.fired_rows[rows].astype(np.float32)),
            "histogram": {"first": int(lo), "bins": BINS, "tall": packed(tall[:, 0], "f4"),
                          "height": packed(np.ceil(histogram[:, lo:hi] / tall * 255), "u1")},
        }  # fmt: skip
        if modality in self.places:
            group = np.repeat(np.arange(len(pairs)), pairs.shape[1])  # one scale for all examples of a latent
            table, most = self.evidence.all_tokens(modality), self.limits[modality].places
            heat = out["heat"] = pair_maps(table, pairs.ravel(), latent.ravel(), group, self.places[modality], most)
            size = sum(len(part["d"]) for part in heat.values())
            self.bytes["maps"] += size
            self.bytes["latents"] -= size  # of which they are a part
        return out

    def _list(self, modality: str, by_latent: Any, rows: slice) -> dict[str, Any]:
        """The shown items on which latents of a shard fire, with ranks among all ``n`` values of the latent: of them
        are percentiles, as :mod:`mmsae.metrics.concepts.query` has them.
        """
        part = by_latent[:, rows]
        part.sort_indices()
        lists = self.evidence.lists(modality)
        start = np.asarray(lists.start[rows.start : rows.stop + 1], np.int64)
        value = np.abs(np.asarray(lists.value[start[0] : start[-1]]))
        owner = np.repeat(np.arange(len(start) - 1), np.diff(start))
        value = value[np.lexsort((value, owner))]
        latent = np.repeat(np.arange(part.shape[1]), np.diff(part.indptr))
        begin, count = start - start[0], np.diff(start)
        upto = bisect(begin, value, latent, part.data, "right")
        return {
            "start": packed(part.indptr, "i4"),
            "item": indices(part.indices, self.shown.m),
            "n": packed(count, "i4"),
            "rank": packed(upto - begin[latent], "u2" if count.max(initial=0) < 65536 else "i4"),
        }

    def _packs(self, captions: list[str]) -> None:
        """Write the shown items, pack by pack."""
        items, display, blobs = self.evidence.items, self.display, 0
        near = {m: relations.similar_samples(c, display.neighbours) for m, c in self.codes.items()}
        _, label = self.labels
        images = bool(self.evidence.about["images"]) and display.images != "none"
        for lo in range(0, self.shown.m, PACK):
            rows = slice(lo, min(lo + PACK, self.shown.m))
            some = self.shown.item[rows]
            record: dict[str, Any] = {
                "uid": [items.uid[i] for i in some], "shard": [items.shard[i] for i in some],
                "key": [items.key[i] for i in some], "caption": captions[rows], "label": label[some].tolist(),
                "view": np.round(items.view[some].astype(float), 4).tolist(),
            }  # fmt: skip
            if images:
                record["picture"] = [_image(self.evidence.thumbnail(int(i))) for i in some]
                blobs += sum(map(len, record["picture"]))
            for m, codes in self.codes.items():
                if m == "text" and (read := [self.evidence.words(int(i)) for i in some]) and any(read):
                    record["tokens"] = [w and [w.position.tolist(), w.text] for w in read]
                if own := self._grids(m, some):
                    record[f"grid.{m}"] = own
                part = codes[rows]
                record[m] = {
                    "start": packed(part.indptr, "i4"),
                    "latent": indices(part.indices, self.d_sae),
                    "value": share_of(part.data, self.stats[m].max[part.indices], "i1"),
                    "near": indices(near[m][0][rows], self.shown.m),
                    "cosine": share_of(near[m][1][rows], np.ones(1), "u1"),
                }
            self.bytes["samples"] += put(self.folder, f"{self.source.id}/items/{lo // PACK}", record)
        self.bytes["samples"] -= blobs
        self.bytes["images"] = blobs

    def _grids(self, modality: str, items: np.ndarray) -> list[tuple[int, int]] | None:
        """Rows and columns of items whose grids are not all that of the modality, else None."""
        grid = self.evidence.grid(modality)
        own = [self.evidence.grid_of(int(i), modality) for i in items] if grid.rows else []
        return own if any(x != (grid.rows, grid.cols) for x in own) else None

    def features(self) -> Iterator[str]:
        """The lines of ``features.jsonl``, once written: every latent in every modality."""
        uid, n_top = self.evidence.items.uid, self.shown.top
        for m, stats in self.stats.items():
            lists, codes, pairs = self.evidence.lists(m), self.evidence.codes(m), self.shown.pairs[m]
            parts = self.shown.quantiles[m]
            each = (pairs.shape[1] - n_top) // max(parts, 1)
            part = np.concatenate([np.zeros(n_top, int), np.repeat(np.arange(1, parts + 1), each)])
            for j in range(self.d_sae):
                has = pairs[j] >= 0
                items, own = pairs[j][has], np.full(has.sum(), j)
                value = lists.value[bisect(lists.start, lists.index, own, items)]
                at = bisect(codes.start, codes.index, items, own)
                shown = {"item": [uid[i] for i in items], "value": value, "part": part[has], "parts": parts,
                         "position": codes.position[at]}  # fmt: skip
                near = tuple(x[j] for x in self.near["near"]) if "near" in self.near else None
                yield feature_lines(j, m, stats, self.evidence.n, shown, near, self.source.names.get(j), self.words[j])

    @cached_property
    def places(self) -> dict[str, int]:
        """Positions of the modalities that have several: those with maps."""
        found = {m: g.places * max(len(g.steps), 1) for m in self.stats if (g := self.evidence.grid(m))}
        return {m: n for m, n in found.items() if n > 1}

    @cached_property
    def limits(self) -> dict[str, MapLimits]:
        """How many maps are kept of the modalities that have some."""
        budget = 1e6 * self.display.map_megabytes / max(len(self.places), 1)
        asked, out = self.display.maps, {}
        for m, n in self.places.items():
            found = out[m] = map_limits(self.evidence, self.shown, m, n, asked, budget)
            less = [f"of the {found.latents} strongest latents of a sample, not {asked}"] * (found.latents < asked)
            less += [f"of the {found.places} strongest places of an example"] * (found.places > 0)
            if less:
                self.notes.append(f"maps of {m}s are kept {' and '.join(less)} (--map-megabytes)")
        return out

    def _maps(self) -> int:
        """Write where the strongest latents of every shown item fire in it; returns of how many at most."""
        mapped = [m for m in self.limits if self.limits[m].latents]
        kept = {m: strongest(self.evidence, m, self.shown.item, self.limits[m].latents) for m in mapped}
        for lo in range(0, self.shown.m if mapped else 0, PACK):
            rows = slice(lo, min(lo + PACK, self.shown.m))
            record = {
                m: sample_maps(self.evidence.all_tokens(m), self.shown.item[rows], kept[m][rows], self.places[m])
                for m in mapped
            }
            self.bytes["maps"] += put(self.folder, f"{self.source.id}/maps/{lo // PACK}", record)
        return max((self.limits[m].latents for m in mapped), default=0)

    def _searched(self, captions: list[str]) -> None:
        """Write what shown items are searched by: uids, captions, keys and labels."""
        items, (names, label) = self.evidence.items, self.labels
        record: dict[str, Any] = {"uid": [items.uid[i] for i in self.shown.item], "caption": captions}
        record["key"] = [items.key[i] for i in self.shown.item]
        if names:
            record["label"] = indices(label[self.shown.item], len(names))
        self.bytes["samples"] += put(self.folder, f"{self.source.id}/samples", record)


def _image(data: bytes | None) -> str:
    """An image as a data URI; empty where there is none."""
    if not data:
        return ""
    kind = "webp" if data[8:12] == b"WEBP" else "png" if data[:4] == b"\x89PNG" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _plain(name: LatentName) -> list[Any]:
    said = name.to_dict()
    return [said[k] for k in ("name", "method", "score", "margin", "z", "auroc", "by", "note")]
