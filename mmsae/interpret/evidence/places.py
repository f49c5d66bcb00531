"""Where the rows of a site lie in their items: cells of an image's grid, tokens of a text; special tokens have none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.evaluation.card.gallery import grid_of
from mmsae.evaluation.features import token_site
from mmsae.hosts import Encoder, Host, LVLMHost, Rows
from mmsae.hosts.tokenizer import token_pieces
from mmsae.interpret.evidence.rows import BatchWords, no_grid
from mmsae.types import IMAGE, TEXT, ImageTextBatch, Site

WHOLE_POLICIES = ("cls", "eos", "pad", "pooled", "image_mean", "text_mean")  # rows that are special, or no tokens


class PlacedRows(NamedTuple):
    """Rows of a batch that may be evidence."""

    rows: Rows  #: Those that are left
    place: Tensor  #: ``(N,)`` int64 place of every row in its item
    grid: Tensor  #: ``(B, 2) int32`` see :class:`~mmsae.interpret.evidence.rows.FiredRows`
    places: int  #: Largest number of places of an item


def place_rows(host: Host, site: Site, rows: Rows, batch: ImageTextBatch) -> PlacedRows:
    """The rows of a site that are no special tokens, and where they lie."""
    n = len(batch.uids)
    if site.tokens in WHOLE_POLICIES or not token_site(site) or rows.position is None:
        return PlacedRows(rows, torch.zeros_like(rows.item), no_grid(n), 1)
    if rows.special is not None:
        rows = _some(rows, ~rows.special)
    if site.modality == TEXT:
        return PlacedRows(rows, rows.position, no_grid(n), _most(rows.position))
    if isinstance(host, LVLMHost) and site.tokens in ("image", "all"):
        return _of_sequence(host, rows, batch)
    count = torch.bincount(rows.item, minlength=n)
    place = torch.arange(len(rows.item), device=rows.item.device) - (count.cumsum(0) - count)[rows.item]
    most = int(count.max()) if n else 1
    size = host.probe_input(IMAGE, 1).shape[-2:] if isinstance(host, Encoder) else (1, 1)
    cells = grid_of(most, *size) or (0, 0)
    grid = torch.tensor(cells, dtype=torch.int32).repeat(n, 1) * (count.cpu() == most)[:, None]
    return PlacedRows(rows, place, grid, max(1, most))


def _of_sequence(host: LVLMHost, rows: Rows, batch: ImageTextBatch) -> PlacedRows:
    """Image tokens of a sequence: the cell of the whole image that each lies in.

    Tiles at higher resolution lie over the whole image, so several rows may share a cell; tokens of no cell (a class
    token, line breaks) are left out.
    """
    n, device = len(batch.uids), rows.item.device
    place, grid = torch.full_like(rows.position, -1), no_grid(n)
    for image in host.grid(batch):
        base, *tiles = image.layout.grids
        shape, where = base.shape, torch.full((image.layout.length,), -1)
        where[base.flatten()] = torch.arange(base.numel())
        for tile in tiles:
            row, col = (torch.arange(t) * s // t for t, s in zip(tile.shape, shape, strict=True))
            where[tile] = row[:, None] * shape[1] + col
        at = rows.position - image.start
        own = (rows.item == image.item) & (at >= 0) & (at < image.layout.length)
        if not grid[image.item].any():  # the first image of an item
            place[own] = where.to(device)[at[own]]
            grid[image.item] = torch.tensor(shape, dtype=torch.int32)
    keep = place >= 0
    return PlacedRows(_some(rows, keep), place[keep], grid, _most(place))


def words_of(host: Host, site: Site, rows: Rows, batch: ImageTextBatch) -> BatchWords | None:
    """The words at the rows of a text site (those of :func:`place_rows`); None where its rows are no tokens."""
    if site.modality != TEXT or site.tokens in WHOLE_POLICIES or not token_site(site) or rows.position is None:
        return None
    if isinstance(host, LVLMHost):
        tokenizer = host.processor.tokenizer
        ids, mask = (batch.inputs[k].cpu() for k in ("input_ids", "attention_mask"))
        texts = [i[m.bool()] for i, m in zip(ids, mask, strict=True)]
    elif isinstance(host, Encoder):
        tokenizer, texts = host.tokenize, list(batch.texts.cpu())
    else:
        found = host.tokenizers.get(site.module.partition(".")[0])
        if found is None:
            return None
        length = int(rows.position.max()) + 2 if len(rows.position) else 1  # the end of a text takes the last place
        length = min(length, found.model_max_length)
        made = found(batch.captions, padding="max_length", truncation=True, max_length=length)["input_ids"]
        tokenizer, texts = found, [torch.tensor(t) for t in made]
    item, position = rows.item.cpu(), rows.position.cpu()
    said: list[str] = []
    for i, ids in enumerate(texts):
        at = position[item == i]
        some = ids[at].tolist()
        said += tokenizer.pieces(some) if hasattr(tokenizer, "pieces") else token_pieces(tokenizer, some)
    return BatchWords(item, position, said)


def _some(rows: Rows, keep: Tensor) -> Rows:
    return Rows(*(None if t is None else t[keep] for t in rows))


def _most(position: Tensor) -> int:
    return max(1, int(position.max()) + 1) if len(position) else 1
