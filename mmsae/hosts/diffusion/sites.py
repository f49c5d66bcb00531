"""What a module of a diffusion pipeline computes, and whether the denoiser consumes it: found by trying."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmsae.hosts.diffusion.call import Call, Runner
from mmsae.hosts.diffusion.call_state import CallState
from mmsae.hosts.diffusion.prompts import encode, old_name
from mmsae.hosts.hooks import Done, Port, first_input, unwrap
from mmsae.types import InputError

_SIDE = 32  # largest side of the latents of a probe


class Consumed(NamedTuple):
    """Which inputs of the denoiser a text site changes."""

    context: bool  #: The states that it attends to.
    pooled: bool  #: The pooled vector beside them.


class Seen(NamedTuple):
    """What a module is called with and returns, for batches of one and two."""

    inputs: list[torch.Size]  #: Shapes of its main argument.
    outputs: list[torch.Size]  #: Shapes of its main output.
    key: int | None  #: Index of that in a returned tuple; None for the first tensor.


def look(runner: Runner, module: str) -> Seen:
    """Shapes of a module's input and output, from a pass of one and one of two prompts.

    Blocks of diffusion transformers are given image and text and return both, in an order of their own: the output is
    what has the shape of the (image) input.
    """
    inputs, outputs, keys = [], [], []

    def after(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        x = first_input(args, kwargs)[1]
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

    with runner.model.get_submodule(module).register_forward_hook(after, with_kwargs=True):
        for n in (1, 2):
            _pass(runner, module.split(".")[0], n)
    if len(inputs) != 2:
        calls = "never called" if not inputs else f"called {len(inputs) // 2} times"
        raise InputError(f"{module} cannot be a site: it is {calls} in one pass of its part of the pipeline.")
    return Seen(inputs, outputs, keys[0])


def _pass(runner: Runner, part: str, n: int) -> None:
    """One pass of a text encoder, or of the denoiser, over ``n`` prompts."""
    if part != runner.denoiser:
        with runner.running(CallState(torch.arange(n))), torch.no_grad():
            runner.read_texts(runner.tokenize(["a"] * n), {part})
        return

    def stop(*_: Any) -> None:
        raise Done

    side = min(_SIDE, *runner.latent_size) * runner.pipeline.vae_scale_factor
    options = {"steps": 2, "guidance": 0.0, "height": side, "width": side, "output_type": "latent"}
    with runner.model[part].register_forward_hook(stop), suppress(Done):
        runner.call(Call.of([""] * n, None, 0, 1, {}), options)


def consumed(runner: Runner, port: Port, options: dict[str, Any]) -> Consumed:
    """Whether noise in a tensor of a text encoder reaches the context and the pooled vector."""

    def encoded() -> tuple[Tensor, Tensor | None]:
        run = CallState(torch.arange(1))
        with runner.running(run), torch.no_grad(), old_name(runner.pipeline):
            found = encode(runner.pipeline, run, ["a"], None, False, options)
        return found["prompt_embeds"], found["pooled_prompt_embeds"]

    def noisy(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        return x + x.float().std().to(x) * noise

    clean = encoded()
    with port.attach(noisy):
        changed = encoded()
    return Consumed(*(a is not None and not torch.equal(a, b) for a, b in zip(clean, changed, strict=True)))
