"""Concept vectors in a text encoder: what a phrase adds to its states, with explicit guidance branches (spec 5.3).

By Concept Steerers (arXiv 2501.19066): all positive pre-codes of the phrase's every position, no top-k, decoded without
bias; added on the conditional branch, subtracted on the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmsae.errors import Warned
from mmsae.hosts.sites import COND, Where
from mmsae.sae import SAE
from mmsae.sae.encoder import AffineEncoder, PerModalityEncoder
from mmsae.steering.edits.attach import LARGE, check_site
from mmsae.steering.edits.codes import linear
from mmsae.steering.edits.gate import _ends
from mmsae.steering.edits.log import SiteLog
from mmsae.steering.methods.text import text_batch
from mmsae.types import InputError

ALIGN = ("kind", "same", "position")
SCOPES = ("cond", "sign")
BOS, CONTENT, EOS, PAD = range(4)


class ConceptVector(NamedTuple):
    """What a phrase adds to the states of a text encoder."""

    vector: Tensor  #: ``(L, d)`` ``J(relu(pre))`` by position, without top-k and without bias.
    kind: Tensor  #: ``(L,)`` BOS, CONTENT, EOS or PAD of each position of the phrase.
    phrase: str

    @property
    def content(self) -> int:
        """Content tokens of the phrase."""
        return int((self.kind == CONTENT).sum())

    def by_kind(self) -> Tensor:
        """``(4, d)`` mean vector of each kind of token; 0 for kinds that the phrase has not."""
        one_hot = torch.nn.functional.one_hot(self.kind, 4).to(self.vector)
        return one_hot.T @ self.vector / one_hot.sum(0).clamp(min=1)[:, None]


@torch.no_grad()
def concept_vector(host: Any, sae: SAE, site: Any, phrase: str) -> ConceptVector:
    """The vector of a phrase by an SAE with an affine encoder, at a text layer.

    With token policy ``all`` of the site the vector has all positions, else those of the policy.

    Raises:
        InputError: An SAE whose pre-codes are no activations, or one of another site.
    """
    at, m = check_site(host, site, sae)
    encoder = sae.encoder.encoders[m] if isinstance(sae.encoder, PerModalityEncoder) else sae.encoder
    if not isinstance(encoder, AffineEncoder):
        raise InputError(f"concept vectors take positive pre-codes, which encoder {encoder.name} does not have.")
    if sae.signed:
        raise InputError("concept vectors take positive pre-codes, and this SAE's codes have signs.")
    tokens = host.capture(text_batch(host, [phrase]), [at])
    x, position, special = (t[at.modality] for t in (tokens.x, tokens.position, tokens.special))
    _, pre, codes = sae._encode({m: x})[m]
    delta = linear(sae, m, pre.dense().relu(), torch.arange(sae.d_sae, device=x.device), codes.info)
    length = int(position.max()) + 1
    vector, kind = delta.new_zeros(length, x.shape[1]), torch.full((length,), PAD, device=x.device)
    vector[position] = delta
    kind[position] = kinds(Where(torch.zeros_like(position), position, special=special))
    return ConceptVector(vector, kind, phrase)


def kinds(where: Where) -> Tensor:
    """``(N,)`` BOS, CONTENT, EOS or PAD of the rows of a text encoder."""
    end = _ends(where)[where.item]
    after = torch.where(where.position == end, EOS, torch.where(where.position < end, BOS, PAD))
    return torch.where(where.special, after, CONTENT)


@contextmanager
def concept_steering(
    host: Any,
    site: Any,
    vector: ConceptVector,
    strength: float,
    *,
    scope: str = "sign",
    align: str = "kind",
    steps: tuple[int, int] | None = None,
) -> Iterator[SiteLog]:
    """While open, prompts are encoded with a concept more (or, with negative strength, less).

    Args:
        host: Diffusion host.
        site: Text layer, see :func:`concept_vector`.
        vector: The concept.
        strength: Lambda; published for removing a concept: -0.5.
        scope: ``sign``, as published: added on the conditional branch, subtracted on the other. ``cond``: the former.
        align: The vector is of the phrase's positions, which are other tokens in a longer prompt. ``kind``: content
            tokens get the mean of the phrase's content, EOS and padding likewise ([D], any length); ``same``: by
            position, and prompts with another number of content tokens are refused; ``position``: by position whatever
            the prompt, as published.
        steps: Half-open window of steps.

    Yields:
        The log. A mean shift above .5 of the state is warned of when the context closes.

    Raises:
        InputError: Unknown scope or alignment, or a prompt that ``same`` refuses.
    """
    if scope not in SCOPES or align not in ALIGN:
        raise InputError(f"scope {scope!r} and align {align!r} are of {', '.join(SCOPES)} and {', '.join(ALIGN)}.")
    log, means = SiteLog(str(site)), vector.by_kind()

    def fn(rows: Tensor, where: Where) -> Tensor:
        cond = torch.ones(len(rows), device=rows.device) if where.branch is None else (where.branch == COND).to(rows)
        sign = 2 * cond - 1 if scope == "sign" else cond
        if align == "same":
            _check_lengths(where, cond.bool(), vector)
        if align == "kind":
            added = means.to(rows)[kinds(where)]
        else:
            known = where.position < len(vector.vector)
            added = vector.vector.to(rows)[where.position.clamp(max=len(vector.vector) - 1)] * known[:, None]
        change = strength * sign[:, None] * added
        touched = (change != 0).any(1)
        if not touched.any():
            log.note(where, None, 0)
            return rows
        size = change[touched].norm(dim=1) / rows[touched].norm(dim=1).clamp(min=1e-12)
        log.note(where, size, touched.sum())
        return torch.where(touched[:, None], rows + change, rows)

    with host.edit(site, fn, where=True, **({} if steps is None else {"steps": steps})):
        yield log
    if log.relative > LARGE:
        warnings.warn(f"{site}: |dx| is {log.relative:.2g} |x| in the mean; images may break", Warned, stacklevel=3)


def _check_lengths(where: Where, cond: Tensor, vector: ConceptVector) -> None:
    n = torch.bincount(where.item[cond & ~where.special], minlength=1)
    wrong = n[where.item[cond].unique()] != vector.content
    if wrong.any():
        found = int(n[where.item[cond].unique()][wrong][0])
        raise InputError(
            f"the vector of {vector.phrase!r} is of {vector.content} content tokens, a prompt has {found}: by position "
            "they would be other tokens; align='kind' takes any length."
        )
