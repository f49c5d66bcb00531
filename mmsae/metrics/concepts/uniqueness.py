"""Do features show different samples, and samples that belong together? From the top samples of each feature."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.metrics.concepts.class_means import as_codes
from mmsae.metrics.concepts.ranked import ranked
from mmsae.types import Codes


@torch.no_grad()
def top_rows(features: Tensor | Codes, n: int = 16, chunk: int = 1024) -> Tensor:
    """``(F, n)`` int64 rows of the n highest activations above 0 of each feature, -1 where there are fewer.

    Of codes with signs, the largest absolute values.

    For codes and channels that are at hand; :class:`mmsae.metrics.TopN` streams. Ties go to the lower row. ``chunk``
    features of a matrix are taken at a time.
    """
    codes, out = as_codes(features), []
    if isinstance(features, Codes):
        codes = codes._replace(values=codes.values.abs())
    if codes.indices is not None:
        r = ranked(codes)
        place = torch.arange(len(r.row), device=r.row.device) - r.start[r.latent]
        top = place < n
        found = r.row.new_full((codes.d_sae, n), -1)
        found[r.latent[top], place[top]] = r.row[top]
        return found
    for part in codes.values.split(chunk, 1):
        v, row = part.T.contiguous().sort(dim=1, descending=True, stable=True)
        v, row = v[:, :n], row[:, :n]
        row = torch.where(v > 0, row, -1)
        out.append(torch.nn.functional.pad(row, (0, n - row.shape[1]), value=-1))
    return torch.cat(out)


@torch.no_grad()
def uniqueness(rows: Tensor, close: float = 0.5, chunk: int = 2048) -> dict[str, float]:
    """How much the top samples of different features overlap (lower is more unique; arXiv 2504.02821).

    Args:
        rows: ``(F, n)`` int64 ids of each feature's top samples, -1 for none (:func:`top_rows`, ``TopTable.rows_in``).
        close: Jaccard index above which two features count as the same.
        chunk: Features at a time; memory is that of the pairs that share a sample, at most ``chunk * F``.

    Returns:
        ``jaccard``: mean over pairs of live features of the Jaccard index of their sets; ``close``: share of pairs
        above the bound; ``features``: live ones. NaN for fewer than two.
    """
    from scipy.sparse import csr_matrix

    rows = rows[(rows >= 0).any(1)].cpu()
    f = len(rows)
    if f < 2:
        return {"jaccard": float("nan"), "close": float("nan"), "features": f}
    on = rows >= 0
    which, samples = on.nonzero()[:, 0].numpy(), rows[on].unique(return_inverse=True)[1].numpy()
    member = csr_matrix((np.ones(len(which)), (which, samples)))
    member.data[:] = 1  # of a sample that a row names twice, too
    size, total, near = np.diff(member.indptr), 0.0, 0
    for lo in range(0, f, chunk):
        common = (member[lo : lo + chunk] @ member.T).tocoo()  # of all others the index is 0
        jaccard = common.data / (size[lo + common.row] + size[common.col] - common.data)
        total += jaccard.sum().item()
        near += int((jaccard > close).sum())
    pairs = f * (f - 1)
    return {"jaccard": (total - f) / pairs, "close": (near - f) / pairs, "features": f}


@torch.no_grad()
def coherence(rows: Tensor, embeddings: Tensor) -> Tensor:
    """``(F,)`` float64 mean pairwise cosine of each feature's top samples; NaN for fewer than two.

    ``rows`` are as :func:`uniqueness` takes them, positions in the ``embeddings (N, d)`` of a judge.
    """
    e = normalize(embeddings.double(), dim=1)
    on = (rows >= 0).to(e.device)
    total = torch.nn.functional.embedding_bag(
        rows.clamp(min=0).to(e.device), e, mode="sum", per_sample_weights=on.double()
    )
    k = on.sum(1).double()
    return torch.where(k > 1, (total.square().sum(1) - k) / (k.square() - k), torch.nan)
