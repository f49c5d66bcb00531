"""Choosing samples by a query over concepts: what the scoring pass keeps for it, and what it says of all samples.

The parts of the pass hold the values of the query's latents alone. Percentiles are over all samples of a job, so that
scores come with the merge and depend neither on kills nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mmsae.metrics.concepts.query import Query, SavedQuery, evaluate, read_query
from mmsae.types import Codes, InputError

COLUMN = "query"  # the score; and what the columns of a part begin with


class QueryResult(NamedTuple):
    """What a query says of the samples of a job."""

    score: np.ndarray  #: ``(N,) float32`` in [0, 1]
    holds: np.ndarray  #: ``(N,) bool``


def usable_query(path: str, sae: str, names: Mapping[int, str], d_sae: int) -> SavedQuery:
    """The query of a file over this SAE, with latents in place of names.

    Raises:
        InputError: It is of another SAE, names what nothing is called, or asks for areas.
    """
    saved = read_query(path, sae)
    query = saved.query.bind(names)
    if query.calls():
        raise InputError(f"{path} asks for {', '.join(sorted(query.calls()))}, which needs areas of patches; filtering "
                         "has one code a sample")  # fmt: skip
    if wrong := [j for j in query.latents() if j >= d_sae]:
        raise InputError(f"{path} asks for latent #{wrong[0]}, and the SAE has {d_sae}")
    return saved._replace(query=query)


def latent_columns(codes: Mapping[str, Codes], latents: Sequence[int], good: Tensor) -> dict[str, pa.Array]:
    """Columns ``query.MODALITY.LATENT`` of a part: values of some latents in the samples that are ``good (B,)``."""
    out = {}
    for m, c in codes.items() if latents else ():
        values = c.gather(torch.tensor(latents, device=c.values.device)).detach().cpu()[good].float().numpy()
        out |= {f"{COLUMN}.{m}.{j}": pa.array(v) for j, v in zip(latents, values.T, strict=True)}
    return out


class _Columns:
    """Columns of a few latents as :class:`~mmsae.metrics.concepts.query.LatentLists`."""

    def __init__(self, columns: Mapping[int, np.ndarray], width: int, n: int) -> None:
        self.columns, self.width, self.n = columns, width, n

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        items = np.flatnonzero(self.columns[i])
        return items, self.columns[i][items]


def score_samples(query: Query, parts: Sequence[Path], n: int) -> QueryResult:
    """What a query says of the n samples of the parts of a scoring pass."""
    found: dict[str, list[np.ndarray]] = {}
    for path in parts:
        columns = [c for c in pq.read_schema(path).names if c.startswith(f"{COLUMN}.")]
        for name in columns:
            found.setdefault(name, []).append(pq.read_table(path, columns=[name])[name].to_numpy())
    by: dict[str, dict[int, np.ndarray]] = {}
    for name, values in found.items():
        _, m, j = name.split(".")
        by.setdefault(m, {})[int(j)] = np.concatenate(values)
    d_sae = max(query.latents(), default=0) + 1
    codes = {m: _Columns(columns, n, d_sae) for m, columns in by.items()} or {"": _Columns({}, n, d_sae)}
    return QueryResult(evaluate(query, codes), evaluate(query, codes, holds=True))
