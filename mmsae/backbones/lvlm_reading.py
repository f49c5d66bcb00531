"""Rows of a vision-language model's states: every forward call is told what its tokens are, with or without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmsae.backbones import lvlm_vision
from mmsae.backbones.hooks import Done
from mmsae.backbones.lvlm_cache import cached
from mmsae.backbones.lvlm_kinds import MEANS, PATCH, Span, flagged, select, span_of
from mmsae.backbones.reading import Rows
from mmsae.backbones.sites import Target, find_port
from mmsae.backbones.tokens import from_tokens, put, to_tokens
from mmsae.backbones.where import Where
from mmsae.types import ImageTextBatch, InputError

if TYPE_CHECKING:
    from mmsae.backbones.lvlm import LVLMBackbone


@contextmanager
def watch(host: LVLMBackbone, seen: list[Any]) -> Iterator[None]:
    """Keep what the latest call of the model says about its tokens in ``seen[0]`` while the context is open."""

    def before(_: Any, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        mask, known = kwargs.get("attention_mask"), host._known
        start = cached(args, kwargs, None if known is None else known.shape[1])  # now: the layers will fill it
        seen[:] = [(ids, mask if isinstance(mask, Tensor) else None, start)]

    handle = host.model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Running:
    """Sums over the tokens of each item that a mean has seen, so that decoding with a cache knows the whole mean."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count: Tensor | float = 0.0
        self.seen = (0, 0)  # items and tokens

    def means(self, tokens: Tensor, keep: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """``(B, d)`` means over the item's tokens so far, and ``(B,) bool`` whose tokens are among these.

        Raises:
            InputError: The cache holds tokens that were not seen here, so the mean is not known.
        """
        w = keep.to(tokens)
        total, count = torch.einsum("bt,btd->bd", w, tokens), w.sum(1)
        if start:
            if self.seen != (len(tokens), start):
                raise InputError(
                    f"a mean over tokens needs all of them: the cache holds {start} of each of {len(tokens)} items, "
                    f"{self.seen[1]} of {self.seen[0]} were seen since the edit was opened."
                )
            total, count = total + self.total, count + self.count
        self.total, self.count, self.seen = total, count, (len(tokens), start + tokens.shape[1])
        return total / count.clamp(min=1)[:, None], keep.any(1)


@contextmanager
def tap(host: LVLMBackbone, target: Target, fn: Callable[[Tensor, Where, Span], Tensor]) -> Iterator[None]:
    """While the context is open, send the rows of a site through ``fn(rows, where, span)``.

    ``rows (N, d)`` are float32. If ``fn`` returns the same object, the host's tensor stays the same object; calls
    without such rows (image tokens while decoding) pass by.
    """
    if not f"{target.module}.".startswith(f"{host.decoder}."):
        with lvlm_vision.tap(host, target, fn):
            yield
        return
    seen: list[Any] = []
    running = _Running()

    def on(x: Tensor) -> Tensor:
        if host._probing:
            return x
        ids, attention, start = seen[0] if seen else (None, None, 0)
        if ids is None:
            raise InputError(f"{target} cannot be read: the model was called without input_ids.")
        known = host._known
        span = span_of(ids, attention, start, host.vocabulary, known)
        prompt = known.shape[1] if known is not None else 0 if ids.shape[1] == 1 else None
        tokens = to_tokens(x, target.layout)
        keep = select(target.tokens, span.kinds).to(x.device)
        mean = target.tokens in MEANS
        if mean:
            rows, has = running.means(tokens.float(), keep, start)
            item, rows = has.nonzero()[:, 0], rows[has]
            image = torch.full_like(item, target.tokens == "image_mean", dtype=torch.bool)
            where = Where(item, None, image, None, start, prompt)
        else:
            item, rows = keep.nonzero()[:, 0], tokens[keep].float()
            kinds, position = span.kinds.to(x.device)[keep], span.position.to(x.device)[keep]
            where = Where(item, position, kinds >= PATCH, flagged(kinds), start, prompt)
        if start and not len(rows):
            return x
        new = fn(rows, where, span)
        if new is rows:
            return x
        if new.shape != rows.shape:
            raise InputError(f"the edit at {target} returned shape {tuple(new.shape)}, not {tuple(rows.shape)}.")
        if mean:
            shift = tokens.new_zeros(len(tokens), tokens.shape[-1]).index_copy(0, item, (new - rows).to(tokens))
            return from_tokens(tokens + shift[:, None] * keep.to(tokens)[..., None], x, target.layout)
        return from_tokens(put(tokens, keep, False, rows, new), x, target.layout)

    with watch(host, seen), find_port(host, target.module, target.io).attach(on):
        yield


def read(host: LVLMBackbone, batch: ImageTextBatch, targets: Sequence[Target]) -> list[Rows]:
    """Rows at several sites, in their order, with one forward pass that stops when all are read."""
    got: dict[int, Rows] = {}

    def recorder(i: int) -> Callable[..., Tensor]:
        def record(rows: Tensor, where: Where, span: Span) -> Tensor:
            got[i] = Rows(rows.clone(), where.item, where.position, where.special)
            if len(got) == len(targets):
                raise Done
            return rows

        return record

    with suppress(Done), ExitStack() as stack:
        for i, target in enumerate(targets):
            stack.enter_context(tap(host, target, recorder(i)))
        host.forward(batch)
    if unread := [str(t) for i, t in enumerate(targets) if i not in got]:
        raise InputError(f"site {unread[0]} was not reached: these prompts have no picture.")
    return [got[i] for i in range(len(targets))]
