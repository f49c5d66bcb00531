"""Sites of a diffusion pipeline: what a spec names, and rows read there from captions."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import torch

from mmsae.backbones.diffusion_call import eager
from mmsae.backbones.diffusion_load import layer_paths
from mmsae.backbones.diffusion_tap import Edit, recorder, tap
from mmsae.backbones.hooks import Done
from mmsae.backbones.reading import Rows
from mmsae.backbones.sites import _SPEC, Target
from mmsae.backbones.tokens import check_policy
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError

if TYPE_CHECKING:
    from mmsae.backbones.diffusion import DiffusionBackbone


def resolve(host: DiffusionBackbone, spec: str) -> Target:
    """What a spec means.

    Raises:
        InputError: It is malformed, or names a module, io or token policy that the pipeline does not have there.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise InputError(f"site {spec!r} is not MODULE.PATH:io[tokens], as in {host.denoiser}.mid_block:out.")
    module, io = match["module"], match["io"] or "out"
    if io not in ("in", "out", "update"):
        raise InputError(f"site {spec!r}: io {io!r} is not one of in, out, update.")
    root, _, rest = module.partition(".")
    modality = host._modality(module)
    if modality == TEXT and rest:
        names = dict(host.model.named_modules())
        module = next((p for p in (module, *layer_paths(root, rest)) if p in names), module)
    layout = host._layout(module, io, modality)
    tokens = match["tokens"] or ("all" if layout.ndim > 2 else "pooled")
    check_policy(tokens, layout, modality, False, f"site {spec!r}")
    if modality == IMAGE and tokens != "all" and layout.ndim > 2:
        raise InputError(f"site {spec!r}: token policy {tokens!r} is not for the denoiser, whose sites have 'all'.")
    return Target(module, io, tokens, modality, layout)


def read(host: DiffusionBackbone, batch: ImageTextBatch, targets: list[Target]) -> list[Rows]:
    """Rows at several text sites, in their order, with one pass that stops when all are read.

    Raises:
        InputError: A site is the denoiser's, or the batch has no texts.
    """
    if any(t.modality == IMAGE for t in targets):
        raise InputError(f"no captions give sites of {host.denoiser}: they are read while it generates (host.stream).")
    if batch.texts is None:
        raise InputError("a site reads the texts of a batch that has none.")
    got: dict[int, Rows] = {}
    with suppress(Done), ExitStack() as stack, torch.no_grad():
        stack.enter_context(eager(host))
        stack.callback(setattr, host, "_reading", host._reading)
        host._reading = True
        for i, target in enumerate(targets):
            stack.enter_context(tap(host, Edit(target), recorder(i, got, len(targets))))
        host._encode(TEXT, batch.texts, {t.module.split(".")[0] for t in targets})
    return [got[i] for i in range(len(targets))]
