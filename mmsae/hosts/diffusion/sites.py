"""Sites of a diffusion pipeline: what a spec names, and rows read there from captions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mmsae.hosts.capture import Rows
from mmsae.hosts.diffusion.call import Call, eager, run_call, running
from mmsae.hosts.diffusion.call_state import Run
from mmsae.hosts.diffusion.load import layer_paths
from mmsae.hosts.diffusion.prompts import encode, old_name
from mmsae.hosts.diffusion.tap import Edit, Seen, recorder, tap
from mmsae.hosts.hooks import Done, _first_input, unwrap
from mmsae.hosts.sites import _SPEC, Target
from mmsae.hosts.tokens import check_policy
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError

if TYPE_CHECKING:
    from mmsae.hosts.diffusion.host import DiffusionHost


def resolve(host: DiffusionHost, spec: str) -> Target:
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


def read(host: DiffusionHost, batch: ImageTextBatch, targets: list[Target]) -> list[Rows]:
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
def _probing(host: DiffusionHost) -> Iterator[None]:
    host._probing = True
    try:
        yield
    finally:
        host._probing = False


def look(host: DiffusionHost, module: str) -> Seen:
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


def _pass(host: DiffusionHost, part: str, n: int) -> None:
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


def _side(host: DiffusionHost) -> int:
    size = getattr(host.model[host.denoiser].config, "sample_size", None)
    size = getattr(host.pipeline, "default_sample_size", 64) if size is None else size
    return min(_SIDE, *(size if isinstance(size, (list, tuple)) else [size]))


def consumed(host: DiffusionHost, target: Target, options: dict[str, Any]) -> Consumed:
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


def accept(host: DiffusionHost, target: Target, found: Consumed, pooled: bool | None) -> Consumed:
    """``found``, or a refusal that says what it lacks; see ``DiffusionHost.check_consumed``."""
    pooled = not target.has_tokens if pooled is None else pooled
    if found.context or (pooled and found.pooled):
        return found
    moves = "only the pooled vector changes, not" if found.pooled else "neither the pooled vector changes nor"
    raise InputError(
        f"site {target}: {type(host.pipeline).__name__} does not consume it as context: {moves} the states that the "
        "denoiser attends to; take an earlier layer."
    )
