"""Sites in the vision tower of a vision-language model: the states that its projector will read.

``vision_tower.encoder.layers.22:out[patches]`` in the model's own naming; policies are ``all``, ``patches``, ``cls``.
Rows are the tokens of one picture after another; a model that cuts pictures into tiles (LLaVA-NeXT) has one such
picture per tile. Towers that pack all patches into one sequence without a batch axis (Qwen-VL) have no such sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmsae.backbones.hooks import Done
from mmsae.backbones.lvlm_kinds import PATCH
from mmsae.backbones.sites import Target, find_port
from mmsae.backbones.tokens import Layout, from_tokens, put, to_tokens
from mmsae.backbones.where import Where
from mmsae.types import IMAGE, InputError

if TYPE_CHECKING:
    from mmsae.backbones.lvlm import LVLMBackbone

POLICIES = ("all", "patches", "cls")


def resolve(host: LVLMBackbone, module: str, io: str, tokens: str) -> Target:
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


def has_cls(host: LVLMBackbone) -> bool:
    """Whether the tower puts a class token before its patches."""
    return any(
        name.endswith("class_embedding") or name.endswith("cls_token") for name, _ in host.model.named_parameters()
    )


def _probe(host: LVLMBackbone, module: str, io: str) -> Layout:
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
def tap(host: LVLMBackbone, target: Target, fn: Callable[[Tensor, Where, Any], Tensor]) -> Iterator[None]:
    """As :func:`mmsae.backbones.lvlm_reading.tap`, for a site of the vision tower; ``span`` is None.

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


def owners(host: LVLMBackbone, pictures: int) -> Tensor | None:
    """``(pictures,)`` the prompt of each picture; None where prompts have several, or tiles."""
    if host._known is None:
        return None
    found = (host._known >= PATCH).any(1).nonzero()[:, 0]
    return found if len(found) == pictures else None
