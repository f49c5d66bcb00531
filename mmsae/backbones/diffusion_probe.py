"""What a module of a pipeline looks like, and whether the pipeline uses it: found by trying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mmsae.backbones.diffusion_call import Call, run_call, running
from mmsae.backbones.diffusion_prompts import encode, old_name
from mmsae.backbones.diffusion_run import Run
from mmsae.backbones.diffusion_tap import Seen
from mmsae.backbones.hooks import Done, _first_input, unwrap
from mmsae.backbones.sites import Target
from mmsae.types import TEXT, InputError

if TYPE_CHECKING:
    from mmsae.backbones.diffusion import DiffusionBackbone

_SIDE = 32  # largest side of the latents of a probe


class Consumed(NamedTuple):
    """Which inputs of the denoiser a text site changes.

    Attributes:
        context: The states that it attends to.
        pooled: The pooled vector beside them.
    """

    context: bool
    pooled: bool


@contextmanager
def _probing(host: DiffusionBackbone) -> Iterator[None]:
    host._probing = True
    try:
        yield
    finally:
        host._probing = False


def look(host: DiffusionBackbone, module: str) -> Seen:
    """Shapes of a module's input and output, from a pass of one and one of two prompts.

    Blocks of diffusion transformers are given image and text and return both, in an order of their own: the output is
    what has the shape of the (image) input.

    Raises:
        InputError: The pipeline never calls it, or several times, or it has no floating point tensor.
    """
    inputs, outputs, keys = [], [], []

    def after(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        x = _first_input(args, kwargs)[1]
        key = None
        if isinstance(out, tuple) and len(out) > 1:
            same = [i for i, v in enumerate(out) if isinstance(v, Tensor) and v.shape == x.shape]
            key = same[-1] if same else None
        y = unwrap(out, key)
        if not y.is_floating_point():
            raise InputError(f"{module} cannot be a site: its tensor is {y.dtype}, not floating point.")
        inputs.append(x.shape)
        outputs.append(y.shape)
        keys.append(key)

    handle = host.model.get_submodule(module).register_forward_hook(after, with_kwargs=True)
    try:
        with _probing(host):
            for n in (1, 2):
                _pass(host, module.split(".")[0], n)
    finally:
        handle.remove()
    if len(inputs) != 2:
        calls = "never called" if not inputs else f"called {len(inputs) // 2} times"
        raise InputError(f"{module} cannot be a site: it is {calls} in one pass of its part of the pipeline.")
    return Seen(inputs, outputs, keys[0])


def _pass(host: DiffusionBackbone, part: str, n: int) -> None:
    """One pass of a text encoder, or of the denoiser, over ``n`` prompts."""
    if part != host.denoiser:
        with running(host, Run(torch.arange(n))), torch.no_grad():
            host._encode(TEXT, host.tokenize(["a"] * n), {part})
        return

    def stop(*_: Any) -> None:
        raise Done

    side = _side(host) * host.pipeline.vae_scale_factor
    options = {"steps": 2, "guidance": 0.0, "height": side, "width": side, "output_type": "latent"}
    handle = host.model[part].register_forward_hook(stop)
    try:
        with suppress(Done):
            run_call(host, Call.of([""] * n, None, 0, 1, {}), options)
    finally:
        handle.remove()


def _side(host: DiffusionBackbone) -> int:
    size = getattr(host.model[host.denoiser].config, "sample_size", None)
    size = getattr(host.pipeline, "default_sample_size", 64) if size is None else size
    return min(_SIDE, *(size if isinstance(size, (list, tuple)) else [size]))


def consumed(host: DiffusionBackbone, target: Target, options: dict[str, Any]) -> Consumed:
    """Whether noise at a text site reaches the context and the pooled vector; the denoiser's own sites count so."""
    if target.modality != TEXT:
        return Consumed(context=True, pooled=False)

    def encoded() -> tuple[Tensor, Tensor | None]:
        run = Run(torch.arange(1))
        with _probing(host), running(host, run), torch.no_grad(), old_name(host.pipeline):
            found = encode(host.pipeline, run, ["a"], None, False, options)
        return found["prompt_embeds"], found["pooled_prompt_embeds"]

    def noisy(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        return x + x.float().std().to(x) * noise

    clean = encoded()
    with host._port(target.module, target.io).attach(noisy):
        changed = encoded()
    return Consumed(*(a is not None and not torch.equal(a, b) for a, b in zip(clean, changed, strict=True)))


def accept(host: DiffusionBackbone, target: Target, found: Consumed, pooled: bool | None) -> Consumed:
    """``found``, or a refusal that says what it lacks; see ``DiffusionBackbone.check_consumed``."""
    pooled = not target.has_tokens if pooled is None else pooled
    if found.context or (pooled and found.pooled):
        return found
    moves = "only the pooled vector changes, not" if found.pooled else "neither the pooled vector changes nor"
    raise InputError(
        f"site {target}: {type(host.pipeline).__name__} does not consume it as context: {moves} the states that the "
        "denoiser attends to; take an earlier layer."
    )
