"""Retrieval between two modalities, from embeddings, reconstructions or sparse codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.kernels.pairs import unit_codes
from mmsae.metrics.statistics import pessimistic_ranks
from mmsae.types import Codes


def groups_of(labels: Sequence) -> Tensor:
    """``(N,)`` int64 ids, equal exactly where the labels (captions, say) are equal."""
    ids: dict = {}
    return torch.tensor([ids.setdefault(c, len(ids)) for c in labels], dtype=torch.long)


def cosine_to(keys: Tensor | Codes) -> Callable[[Tensor | Codes], Tensor]:
    """A function from ``n`` queries to their ``(n, len(keys))`` cosines with all keys.

    Sparse keys stay sparse: only the queries of one call are made dense.
    """
    if isinstance(keys, Codes):
        keys = unit_codes(keys)
        return lambda q: keys.decode_with(unit_codes(q).to_dense().T.contiguous()).T
    keys = normalize(keys, dim=1)
    return lambda q: normalize(q, dim=1) @ keys.T


def cosine_to_few(keys: Codes) -> Callable[[Codes], Tensor]:
    """:func:`cosine_to` for few keys and many queries (classes and images): the keys are made dense, once."""
    atoms = unit_codes(keys).to_dense().T.contiguous()
    return lambda q: unit_codes(q).decode_with(atoms)


@torch.no_grad()
def recall_at(
    queries: Tensor | Codes,
    keys: Tensor | Codes,
    same: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 512,
) -> dict[int, float]:
    """``{k: share of queries whose partner is among the k nearest keys by cosine}``; ties count against the partner.

    Args:
        queries: ``(N, d)`` or codes of N rows.
        keys: Row i is the partner of query i.
        same: ``(N,)`` group ids; any key of the query's own group (an equal caption, say) is right. None: row i only.
        ks: Cut-offs.
        chunk: Queries at a time; memory is ``chunk * (N + d_sae)`` floats.
    """
    n = queries.n if isinstance(queries, Codes) else len(queries)
    score = cosine_to(keys)
    device = (keys.values if isinstance(keys, Codes) else keys).device
    same = torch.arange(n, device=device) if same is None else same.to(device)
    ranks = []
    for lo in range(0, n, chunk):
        part = slice(lo, lo + chunk)
        q = queries.rows(part) if isinstance(queries, Codes) else queries[part]
        ranks.append(pessimistic_ranks(score(q), same[part, None] == same[None]))
    ranks = torch.cat(ranks)
    return {k: (ranks < k).double().mean().item() for k in ks}


def both_ways(
    image: Tensor | Codes, text: Tensor | Codes, same: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[int, float]]:
    """:func:`recall_at` in both directions: ``{"image_to_text": {k: recall}, "text_to_image": {k: recall}}``."""
    return {"image_to_text": recall_at(image, text, same, ks), "text_to_image": recall_at(text, image, same, ks)}
