"""Evidence of a denoiser: prompts are drawn, and what fires is read in the maps of some steps while they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmsae.activations.generated import read_prompts
from mmsae.evaluation.card.gallery import grid_of
from mmsae.hosts import DiffusionHost, Rows
from mmsae.hosts.sites import COND, Where
from mmsae.interpret.evidence.places import PlacedRows
from mmsae.options import Drawing
from mmsae.shards import FaultLog, Reader, Sample, Shard, UnitBatch, expand, make_uid, shard_name
from mmsae.shards.batches import Collate
from mmsae.types import ImageTextBatch, InputError, Site

PROMPTS = ".txt"


def corpus_paths(shards: str | Sequence[str]) -> list[str]:
    """The tars that are meant, or the files of texts, one a line."""
    asked = [shards] if isinstance(shards, str) else [str(s) for s in shards]
    if not any(s.endswith(PROMPTS) for s in asked):
        return list(expand(shards))
    if other := [s for s in asked if not s.endswith(PROMPTS)]:
        raise InputError(f"files of texts ({PROMPTS}) and shards ({other[0]}) cannot be read together")
    return [Shard(s) for s in asked]


def text_samples(path: str) -> list[Sample]:
    """The lines of a file of texts as samples without images, each text once."""
    name, out = shard_name(path), []
    for i, text in enumerate(read_prompts(str(path))):
        key = f"{i:06d}"
        out.append(Sample(make_uid("", name, key, {}), key, name, None, text, {}, None, {}))
    return out


def text_batches(paths: Sequence[str], batch_size: int, collate: Collate) -> Iterator[UnitBatch]:
    """Batches of files of texts, as ``unit_batches`` gives them of tars."""
    reader = Reader.of(None, None, batch_size, (), collate=collate)
    for path in paths:
        faults, held = FaultLog(), None
        samples = text_samples(path)
        faults.seen(len(samples))
        for batch in reader.batches(samples, faults):
            if held is not None:
                yield UnitBatch(path, held, False)
            held = batch
        yield UnitBatch(path, held, True)


def steps_read(drawing: Drawing, n: int) -> tuple[int, ...]:
    """Steps at which maps are read, evenly spread over the schedule."""
    return tuple(sorted({int(s) for s in np.linspace(0, drawing.steps - 1, min(n, drawing.steps)).round()}))


def seed_of(uid: str, seed: int) -> int:
    """Seed of an item's noise, which depends on its uid, so that neither batches nor shards change it."""
    return (int(uid[:8], 16) + seed) % 2**31


def draw_rows(
    host: DiffusionHost, site: Site, batch: ImageTextBatch, drawing: Drawing, steps: Sequence[int], seed: int
) -> tuple[list[Image.Image], PlacedRows]:
    """The images of a batch's captions, and the rows of the conditional branch at some steps.

    A row's place is ``(place of its step in steps) * cells + cell``.
    """
    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    grid: list[tuple[int, int]] = []

    def keep(rows: Tensor, where: Where) -> Tensor:
        if where.step in steps:
            on = where.branch == COND
            at = where.position if where.position is not None else torch.zeros_like(where.item)
            kept[steps.index(where.step)] = rows[on].detach().clone(), where.item[on], at[on]
            cells = int(at.max()) + 1
            grid[:] = [where.grid or grid_of(cells, 1, 1) or (0, 0)]
        return rows

    seeds = [seed_of(u, seed) for u in batch.uids]
    with host.edit(site, keep, where=True):
        made = host.generate(
            batch.captions, negative=drawing.negative, steps=drawing.steps, guidance=drawing.guidance, seed=seeds,
            batch_size=len(seeds),
        )  # fmt: skip
    if len(kept) < len(steps):
        raise InputError(f"site {site.spec} was read at {len(kept)} of the {len(steps)} steps {list(steps)}")
    n, cells = len(batch.uids), max(int(at.max()) + 1 for _, _, at in kept.values())
    x, item, place = (torch.cat(t) for t in zip(*((x, i, s * cells + at) for s, (x, i, at) in sorted(kept.items())),
                                                strict=True))  # fmt: skip
    order = (item * len(steps) * cells + place).argsort(stable=True)
    rows = Rows(x[order].float(), item[order], place[order])
    pixels = (made.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    table = torch.tensor(grid[0], dtype=torch.int32).repeat(n, 1)
    return [Image.fromarray(p) for p in pixels], PlacedRows(rows, rows.position, table, cells)
