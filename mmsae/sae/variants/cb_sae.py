"""Concept-bottleneck SAEs (CB-SAE, arXiv 2512.10805): latents of low use go, latents for a user's concepts come.

What goes is :func:`mmsae.sae.prune_latents`, what comes :func:`mmsae.sae.append_concepts`: a linear autoencoder beside
the SAE, with its own number of latents a row, ``x_hat = D' z' + b + D_cb top_k(E_cb x)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmsae.sae.selector import AnyPreCodes, SelectContext, Selected, TopK
from mmsae.types import InputError


class ConceptTopK(TopK):
    """TopK among all latents but the last ``concepts``, and another number of these: neither displaces the other.

    Args:
        k: Latents kept a row of the first ones.
        concepts: How many latents at the end are concepts.
        concept_k: Concepts kept a row.
    """

    name = "concept_topk"

    def __init__(self, k: int = 32, concepts: int = 5, concept_k: int = 5) -> None:
        super().__init__(k)
        if not 1 <= concept_k <= concepts:
            raise InputError(f"concept_k must lie between 1 and the {concepts} concepts, not {concept_k}")
        self.concepts, self.concept_k = concepts, concept_k

    def config(self) -> dict[str, Any]:
        return {"k": self.k, "concepts": self.concepts, "concept_k": self.concept_k}

    def build(self, d_sae: int, modalities: Sequence[str]) -> None:
        """Check that k fits beside the concepts."""
        if self.k > d_sae - self.concepts:
            raise InputError(f"k = {self.k} and {self.concepts} concepts do not fit d_sae = {d_sae}")
        self.first = d_sae - self.concepts

    def forward(self, pre: AnyPreCodes, rows: SelectContext) -> Selected:
        ids = torch.arange(self.first, self.first + self.concepts, device=rows.target.device)
        linear, indices = pre.topk(self.k, lambda u, _: u.index_fill(1, ids, -torch.inf))
        with torch.no_grad():
            own = self.first + pre.columns(ids).topk(self.concept_k, dim=1, sorted=False).indices
        values = torch.cat([self.keep(pre, indices, linear), self.keep(pre, own)], 1)
        return values, torch.cat([indices, own], 1)
