"""Rows of a vision-language model's states: every forward call is told what its tokens are, with or without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmsae.hosts.capture import Rows
from mmsae.hosts.hooks import Done
from mmsae.hosts.lvlm.cache import cached
from mmsae.hosts.lvlm.load import MEANS, PATCH, Span, flagged, select, span_of
from mmsae.hosts.sites import Target, Where, find_port
from mmsae.hosts.tokens import Layout, from_tokens, put, to_tokens
from mmsae.types import IMAGE, ImageTextBatch, InputError

if TYPE_CHECKING:
    from mmsae.hosts.lvlm.host import LVLMHost


@contextmanager
def watch(host: LVLMHost, seen: list[Any]) -> Iterator[None]:
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
def tap(host: LVLMHost, target: Target, fn: Callable[[Tensor, Where, Span], Tensor]) -> Iterator[None]:
    """While the context is open, send the rows of a site through ``fn(rows, where, span)``.

    ``rows (N, d)`` are float32. If ``fn`` returns the same object, the host's tensor stays the same object; calls
    without such rows (image tokens while decoding) pass by.
    """
    if not f"{target.module}.".startswith(f"{host.decoder}."):
        with tap_tower(host, target, fn):
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


def read(host: LVLMHost, batch: ImageTextBatch, targets: Sequence[Target]) -> list[Rows]:
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


POLICIES = ("all", "patches", "cls")


def resolve(host: LVLMHost, module: str, io: str, tokens: str) -> Target:
    """The target of a module outside the language model, whose shape is seen by showing the host a blank picture.

    Raises:
        InputError: Another module than the tower's, a policy that it has not, or a tensor without a row per picture.
    """
    if not any(part.startswith("vis") for part in module.split(".")):  # vision_tower, vision_model, visual
        raise InputError(
            f"site {module}: it is part neither of the language model {host.decoder} nor of a vision tower."
        )
    if tokens not in POLICIES:
        raise InputError(
            f"site {module}: token policy {tokens!r} is not one of {', '.join(POLICIES)} of a vision tower."
        )
    if (module, io) not in host._layouts:
        host._layouts[module, io] = _probe(host, module, io)
    target = Target(module, io, tokens, IMAGE, host._layouts[module, io])
    if tokens == "cls" and not has_cls(host):
        raise InputError(f"site {target}: this vision tower has no class token.")
    return target


def has_cls(host: LVLMHost) -> bool:
    """Whether the tower puts a class token before its patches."""
    return any(
        name.endswith("class_embedding") or name.endswith("cls_token") for name, _ in host.model.named_parameters()
    )


def _probe(host: LVLMHost, module: str, io: str) -> Layout:
    from PIL import Image

    seen: list[torch.Size] = []

    def note(x: Tensor) -> Tensor:
        seen.append(x.shape)
        raise Done

    side = getattr(getattr(host.model.config, "vision_config", None), "image_size", None) or 224
    batch = host.collate.batch(["?"], [Image.new("RGB", (side, side))])
    host._probing = True  # edits that are open do not see it
    try:
        with suppress(Done), find_port(host, module, io).attach(note):
            host.forward(batch)
    finally:
        host._probing = False
    if not seen:
        raise InputError(f"{module}:{io} cannot be a site: no picture reaches it.")
    if len(seen[0]) != 3:
        raise InputError(
            f"{module}:{io} cannot be a site: its shape is {tuple(seen[0])}, not (pictures, tokens, width)."
        )
    return Layout(3, 0, 2, seen[0][2])


@contextmanager
def tap_tower(host: LVLMHost, target: Target, fn: Callable[[Tensor, Where, Any], Tensor]) -> Iterator[None]:
    """As :func:`tap`, for a site of the vision tower; ``span`` is None.

    ``where.item`` is the row of the batch where every prompt with a picture has one, else the number of the picture (or
    tile). ``where.special`` is the class token.
    """
    first = has_cls(host)

    def on(x: Tensor) -> Tensor:
        if host._probing:
            return x
        tokens = to_tokens(x, target.layout)
        n, length = tokens.shape[:2]
        special = torch.zeros(n, length, dtype=torch.bool, device=x.device)
        special[:, 0] = first
        keep = {"all": torch.ones_like(special), "patches": ~special, "cls": special}[target.tokens]
        item, position = keep.nonzero(as_tuple=True)
        owner = owners(host, n)
        item = item if owner is None else owner.to(x.device)[item]
        rows = tokens[keep].float()
        new = fn(rows, Where(item, position, torch.ones_like(item, dtype=torch.bool), special[keep]), None)
        if new is rows:
            return x
        if new.shape != rows.shape:
            raise InputError(f"the edit at {target} returned shape {tuple(new.shape)}, not {tuple(rows.shape)}.")
        return from_tokens(put(tokens, keep, False, rows, new), x, target.layout)

    with find_port(host, target.module, target.io).attach(on):
        yield


def owners(host: LVLMHost, pictures: int) -> Tensor | None:
    """``(pictures,)`` the prompt of each picture; None where prompts have several, or tiles."""
    if host._known is None:
        return None
    found = (host._known >= PATCH).any(1).nonzero()[:, 0]
    return found if len(found) == pictures else None
