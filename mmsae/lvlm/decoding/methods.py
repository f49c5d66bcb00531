"""Ways of answering that are compared on hallucination: plain decoding, concept decoding, its controls, and directions.

Directions are edits of the state itself: SSL (arXiv 2505.16146) pushes image tokens along a faithful latent and, while
decoding, tokens away from a hallucination latent; SAVE (arXiv 2512.07730) adds the mean of faithful latents and
subtracts that of hallucination ones everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.hosts.lvlm.host import LVLMHost
from mmsae.hosts.sites import Where
from mmsae.lvlm.decoding.concept import ConceptDecoder
from mmsae.lvlm.decoding.settings import Settings
from mmsae.lvlm.tokens import TokenScorer
from mmsae.sae import SAE
from mmsae.types import TEXT, Codes, ImageTextBatch, InputError

METHODS = ("greedy", "sample", "beta", "concept", "ssl", "save")
Answer = Callable[[ImageTextBatch], list[str]]
Edit = Callable[[Tensor, Where], Tensor]


class AnswerLatents(NamedTuple):
    """Latents that go with right answers, and with wrong ones.

    Attributes:
        faithful: ``(n,)`` ids, strongest first.
        hallucination: ``(n,)`` ids.
        difference: ``(d_sae,)`` ``P(fires | right) - P(fires | wrong)``.
        answers: Right answers that were used, and as many wrong ones.
    """

    faithful: Tensor
    hallucination: Tensor
    difference: Tensor
    answers: int


def find_latents(codes: Codes, right: Tensor, n: int = 10, seed: int = 0) -> AnswerLatents:
    """Latents whose firing differs most between questions that were answered rightly and wrongly (SAVE).

    Args:
        codes: One row per question, e.g. max-pooled over its tokens.
        right: ``(N,)`` bool.
        n: Latents of each kind.
        seed: Seed of the draw that makes the two sets equally large.

    Raises:
        InputError: All answers are right, or none is.
    """
    sides = [right.nonzero()[:, 0], (~right).nonzero()[:, 0]]
    size = min(map(len, sides))
    if not size:
        raise InputError(f"{len(sides[0])} answers are right and {len(sides[1])} wrong: directions need both kinds")
    g = torch.Generator().manual_seed(seed)
    rates = []
    for side in sides:  # drawn, not cut off: shards are in an order
        rows = codes.rows(side[torch.randperm(len(side), generator=g)[:size].to(side.device)])
        rates.append((rows.to_dense() > 0).double().mean(0))
    difference = rates[0] - rates[1]
    order = difference.argsort(descending=True, stable=True)
    return AnswerLatents(order[:n], order.flip(0)[:n], difference, size)


def unit_direction(sae: SAE, latents: Tensor) -> Tensor:
    """``(d,)`` unit vector: the mean of the unit atoms of some latents."""
    atoms = sae.dictionary(TEXT if TEXT in sae.modalities else sae.modalities[0]).rows()[latents]
    return normalize(normalize(atoms.detach(), dim=1).mean(0), dim=0)


def ssl_edit(faithful: Tensor, hallucination: Tensor, gamma: float) -> Edit:
    """Image tokens of the prompt gain ``gamma |x|`` along ``faithful``; generated ones lose it along ``hallucination``.

    Generated tokens are known by the cache, so it must be on.
    """

    def edit(rows: Tensor, where: Where) -> Tensor:
        if not gamma:
            return rows
        size = gamma * rows.norm(dim=1, keepdim=True)
        if not where.prefill():
            return rows - size * hallucination.to(rows)
        return rows + where.image[:, None] * size * faithful.to(rows)

    return edit


def save_edit(faithful: Tensor, hallucination: Tensor, gamma: float, alpha: float | None = None) -> Edit:
    """All tokens but the first gain ``faithful - hallucination``, times ``alpha``, or ``gamma |x|`` without one.

    The first token's state is many times larger than others; those of the template are moved, for the last one of them
    is where an answer begins.
    """

    def edit(rows: Tensor, where: Where) -> Tensor:
        size = gamma * rows.norm(dim=1, keepdim=True) if alpha is None else torch.full_like(rows[:, :1], alpha)
        if not size.any():
            return rows
        return rows + (where.position > 0)[:, None] * size * (faithful - hallucination).to(rows)

    return edit


def find_directions(
    host: LVLMHost, sae: SAE, batches: Iterable[ImageTextBatch], labels: Sequence[str], gamma: float
) -> tuple[dict[str, tuple[str, Edit]], dict[str, Any]]:
    """SSL and SAVE edits with their site, from questions whose answers are known; and what was found."""
    scorer = TokenScorer(host, sae)
    text, answers = [], []
    for batch in batches:
        text.append(scorer.pooled(batch)[TEXT].to_dense())
        answers += host.answer(batch, max_new_tokens=8)
    codes = Codes(torch.cat(text), None, sae.d_sae)
    right = torch.tensor([a.lower().startswith(label) for a, label in zip(answers, labels, strict=True)])
    many, one = find_latents(codes, right), find_latents(codes, right, 1)
    ssl, save = ([unit_direction(sae, ids) for ids in found[:2]] for found in (one, many))
    site = next(iter(scorer.sites.values()))
    at = f"{site.module}:{site.io}"
    about = {"faithful": many.faithful.tolist(), "hallucination": many.hallucination.tolist(), "probed": many.answers}
    return {"ssl": (at, ssl_edit(*ssl, gamma)), "save": (at, save_edit(*save, gamma))}, about


def steered(host: LVLMHost, site: str, edit: Edit) -> AbstractContextManager[None]:
    """While the context is open, the edit holds at all tokens of a module (``layers.2:out``), decoding included.

    What is done to image tokens after the last block reaches nothing: no block reads them there.
    """
    return host.edit(f"{site.partition('[')[0]}[all]", edit, where=True)


def make_methods(
    names: Sequence[str],
    host: LVLMHost,
    settings: Settings,
    decoder: Callable[[Settings], ConceptDecoder] | None = None,
    edits: Mapping[str, tuple[str, Edit]] | None = None,
) -> dict[str, Answer]:
    """``{name: batch -> answers}``.

    ``greedy`` and ``sample`` are the model alone; ``concept`` is concept decoding, and with it always comes ``beta``,
    the same cut without concepts, which it has to beat.

    Args:
        names: Some of ``METHODS``.
        host: The host.
        settings: Settings of concept decoding; their length, temperature and sampling hold for all but ``greedy``.
        decoder: Makes a decoder with some settings; needed for ``concept`` and ``beta``.
        edits: ``{"ssl": (site, edit), "save": (site, edit)}``, decoded as ``greedy``.

    Raises:
        InputError: An unknown method, or one that lacks what it needs.
    """
    wanted = list(dict.fromkeys(["greedy", *names, *(["beta"] if "concept" in names else [])]))
    greedy = {"do_sample": False, "max_new_tokens": settings.max_new_tokens}
    out: dict[str, Answer] = {}
    for name in sorted(wanted, key=lambda n: METHODS.index(n) if n in METHODS else -1):
        if name == "greedy":
            out[name] = lambda batch: host.answer(batch, **greedy)
        elif name == "sample":
            out[name] = lambda batch: host.answer(batch, **{**settings.generation(), "do_sample": True})
        elif name in ("beta", "concept"):
            if decoder is None:
                raise InputError("methods concept and beta need an SAE of image and text states: give --sae")
            out[name] = decoder(settings if name == "concept" else settings.control()).answer
        elif name in ("ssl", "save"):
            if name not in (edits or {}):
                raise InputError(f"method {name} needs an SAE on tokens and shards to find directions on: give --probe")
            out[name] = _edited(host, *edits[name], greedy)
        else:
            raise InputError(f"method {name!r} is not one of {', '.join(METHODS)}")
    return out


def _edited(host: LVLMHost, site: str, edit: Edit, options: dict) -> Answer:
    def answer(batch: ImageTextBatch) -> list[str]:
        with steered(host, site, edit):
            return host.answer(batch, **options)

    return answer
