"""The way from a host's tensor to rows ``(N, d)`` and back: the layout of the tensor and the token policy of the site.

Layouts: ``(B, d)``, ``(B, T, d)``, ``(T, B, d)``, convolution maps ``(B, d, H, W)`` and ``(B, H, W, d)``. They all
become ``(B, T, d)`` with ``T = H * W`` for maps and ``T = 1`` for pooled tensors.

Policies (which tokens are the rows, in order of item and position):
    all: Every token.
    cls: The class token.
    patches: Image tokens without class and register tokens.
    mask: Text tokens without padding; BOS and EOS are among them and flagged as special.
    content: Text tokens without padding, BOS and EOS.
    pad: Padding of text, which diffusion models read like any other token.
    eos: The text token that the host pools, where the sentence's state ends up.
    pooled: One row per item: the tensor itself where it has no tokens, else the mean of ``patches`` or ``mask``.
        Editing such a mean adds the difference to every token that was averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.types import TEXT, InputError

POLICIES = ("pooled", "cls", "patches", "eos", "mask", "content", "pad", "all")


class Layout(NamedTuple):
    """Where batch and channels are in a host's tensor."""

    ndim: int  #: 2 (pooled), 3 (tokens) or 4 (map).
    batch: int  #: Axis of the items.
    channel: int  #: Axis of the features.
    width: int  #: Size of that axis.


def find_layout(one: torch.Size, two: torch.Size, channels_last: bool, where: str) -> Layout:
    """Layout from the shapes that a batch of one and a batch of two gave; ``where`` names the site in messages.

    ``channels_last``, what the host says about its maps, decides only where the shape does not.
    """
    grown = [i for i, (a, b) in enumerate(zip(one, two, strict=False)) if (a, b) == (1, 2)]
    rest = [i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    if len(one) not in (2, 3, 4) or grown != rest or len(grown) != 1 or (len(one) == 4 and grown != [0]):
        raise InputError(
            f"{where} cannot be a site: batches of 1 and 2 give shapes {tuple(one)} and {tuple(two)}, "
            "which is not (B, d), (B, T, d), (T, B, d) or a map."
        )
    channel = len(one) - 1
    if len(one) == 4:
        a, b, c = one[1:]
        square_first, square_last = a == b != c, b == c != a
        channel = 3 if square_first or (channels_last and not square_last) else 1
    return Layout(len(one), grown[0], channel, one[channel])


def to_tokens(x: Tensor, layout: Layout) -> Tensor:
    """``(B, T, d)`` view or copy of a host's tensor."""
    if layout.ndim == 2:
        return x[:, None]
    return x.movedim((layout.batch, layout.channel), (0, -1)).flatten(1, -2)


def from_tokens(tokens: Tensor, like: Tensor, layout: Layout) -> Tensor:
    """The host's shape, strides and dtype again, from ``(B, T, d)``."""
    if layout.ndim == 2:
        moved = tokens[:, 0]
    else:
        shape = like.movedim((layout.batch, layout.channel), (0, -1)).shape
        moved = tokens.reshape(shape).movedim((0, -1), (layout.batch, layout.channel))
    return torch.empty_like(like).copy_(moved)


class Marks(NamedTuple):
    """What the host says about the tokens of a batch."""

    content: Tensor  #: ``(B, T)`` image patches, or text tokens that are no padding.
    special: Tensor  #: ``(B, T)`` class, register, BOS, EOS or padding tokens.
    cls: int | None = None  #: Position of the class token, None where the host has none.
    eos: Tensor | None = None  #: ``(B,)`` position of the token that the text tower pools, None for images.
    #: False where T is no number of tokens that the host explains (queries of a pooling layer, say).
    known: bool = True


def image_marks(tokens: Tensor, prefix: int, patches: int | None) -> Marks:
    """Marks of ``tokens (B, T, d)`` of a tower that puts ``prefix`` class and register tokens before its ``patches``.

    ``patches`` is None where the tower does not say. A layer before the class token was added has just these, and no
    prefix.
    """
    b, t, _ = tokens.shape
    known = not prefix or patches is None or t in (patches, patches + prefix)
    if not known or t == patches:
        prefix = 0
    content = (torch.arange(t, device=tokens.device) >= prefix).expand(b, t)
    return Marks(content, ~content, 0 if prefix else None, known=known)


def last_word(ids: Tensor, pad: int | None, eos: int | None) -> Tensor:
    """``(B,)`` position of the last of ``ids (B, L)`` before the padding at the end; 0 where a text has no words.

    Args:
        ids: Token ids.
        pad: Id of padding; None stands for 0.
        eos: Id that ends a text. Where it is that of padding, too (T5, SigLIP), the first one is no padding.
    """
    at = torch.arange(ids.shape[1], device=ids.device)
    end = torch.where(ids != (0 if pad is None else pad), at, -1).amax(1)  # -1 where a text has no words
    return (end + int(pad is not None and pad == eos)).clamp(0, ids.shape[1] - 1)


def text_marks(ids: Tensor, end: Tensor, eos: Tensor | None, special: Sequence[int]) -> Marks:
    """Marks of ``ids (B, L)``.

    Args:
        ids: Token ids.
        end: ``(B,)`` position of the last token that is no padding.
        eos: ``(B,)`` position of the token that the tower pools; None where that is none of these.
        special: Ids of BOS, EOS, class and separator tokens.
    """
    content = torch.arange(ids.shape[1], device=ids.device) <= end[:, None]
    no_word = ~content | torch.isin(ids, torch.tensor(special, device=ids.device))
    return Marks(content, no_word if eos is None else no_word.scatter(1, eos[:, None], True), None, eos)


def keep_mask(policy: str, marks: Marks) -> Tensor:
    """``(B, T)`` which tokens a policy takes (``pooled``: which ones it averages).

    It is refused where there are none (a layer before the class token was added, say).
    """
    if policy == "all":
        return torch.ones_like(marks.content)
    if not marks.known or (policy == "cls" and marks.cls is None):
        raise InputError(f"token policy {policy!r}: a site with {marks.content.shape[1]} tokens has none; use 'all'.")
    if policy in ("cls", "eos"):
        at = marks.eos[:, None] if policy == "eos" else marks.cls
        return (torch.arange(marks.content.shape[1], device=marks.content.device) == at).expand_as(marks.content)
    if policy == "pad":
        return ~marks.content
    return marks.content & ~marks.special if policy == "content" else marks.content


def check_policy(policy: str, layout: Layout, modality: str, has_cls: bool, where: str) -> None:
    """Refuse a token policy that the site cannot have, with the reason."""
    why = ""
    if policy not in POLICIES:
        why = f"is not one of {', '.join(POLICIES)}"
    elif layout.ndim == 2 and policy != "pooled":
        why = "needs tokens, but the site has one row per item (use 'pooled')"
    elif policy in ("eos", "mask", "content", "pad") and modality != TEXT:
        why = "is for text, but the site is an image site"
    elif policy == "patches" and modality == TEXT:
        why = "is for images, but the site is a text site"
    elif policy == "cls" and (not has_cls or layout.ndim == 4):
        why = "needs a class token, but the site has none"
    if why:
        raise InputError(f"{where}: token policy {policy!r} {why}.")


def take(tokens: Tensor, keep: Tensor | None, pooled: bool) -> Tensor:
    """Rows ``(N, d)`` of ``tokens (B, T, d)``, those in ``keep (B, T)`` or all; may share memory with them.

    ``pooled`` takes ``(B, d)`` means over the kept tokens instead.
    """
    if keep is None:
        return tokens.flatten(0, 1)
    if not pooled:
        return tokens[keep]
    w = keep.to(tokens)[..., None]
    return (tokens * w).sum(1) / w.sum(1).clamp(min=1)


def put(tokens: Tensor, keep: Tensor | None, pooled: bool, old: Tensor, new: Tensor) -> Tensor:
    """``tokens`` with the rows ``old``, as :func:`take` gave them, replaced by ``new``; never in place."""
    if keep is None:
        return new.to(tokens).reshape_as(tokens)
    if pooled:
        return tokens + (new - old).to(tokens)[:, None] * keep.to(tokens)[..., None]
    return tokens.masked_scatter(keep[..., None], new.to(tokens))
