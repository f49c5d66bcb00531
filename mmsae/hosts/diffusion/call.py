"""One call of a pipeline: what it is given, prompt by prompt, and what has to hold while it runs."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmsae.hosts.diffusion.call_state import Run, clock
from mmsae.hosts.diffusion.prompts import EMBEDS, SECOND, encode, guided, old_name
from mmsae.hosts.hooks import Done
from mmsae.hosts.names import reason
from mmsae.types import TEXT, InputError

if TYPE_CHECKING:
    from mmsae.hosts.diffusion.host import DiffusionHost

_PER_PROMPT = (*EMBEDS, *SECOND, "latents")  # options with one entry per prompt (latents: per image)
_OURS = {"guidance", "steps", "height", "width", *SECOND, *EMBEDS}  # not handed on as they are
_warned = False


class Call(NamedTuple):
    """Images to be made, one entry each.

    Attributes:
        prompts: Their prompts.
        negatives: Their negative prompts, or None for the pipeline's default.
        seeds: Of their noise.
        items: ``(n,)`` which prompt of those that were given.
        options: Options of the pipeline's call with one entry per image.
    """

    prompts: list[str]
    negatives: list[str] | None
    seeds: list[int]
    items: Tensor
    options: dict[str, Any]

    @classmethod
    def of(
        cls,
        prompts: str | Sequence[str],
        negative: str | Sequence[str] | None,
        seed: int | Sequence[int],
        repeats: int,
        options: Mapping[str, Any],
    ) -> Call:
        """``repeats`` images of each prompt, next to each other, with seeds that count on.

        Raises:
            InputError: There are not as many prompts as negatives, seeds or embeddings.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        given = options.get("prompt_embeds")
        if given is not None and not prompts:
            prompts = [""] * len(given)
        n = len(prompts)
        if not n:
            raise InputError("prompts is empty: there is nothing to generate.")
        lists: dict[str, Any] = {k: options[k] for k in _PER_PROMPT if options.get(k) is not None}
        lists |= {"seed": seed, "negative": negative}
        for name, value in lists.items():
            want = n * repeats if name == "latents" else n
            if not isinstance(value, str) and hasattr(value, "__len__") and len(value) != want:
                raise InputError(f"{name} has {len(value)} entries for {n} prompts with {repeats} images each.")
        seeds = [int(s) for s in seed] if hasattr(seed, "__len__") else [int(seed)] * n
        negatives = [negative] * n if isinstance(negative, str) else negative and list(negative)
        row = torch.arange(n).repeat_interleave(repeats)

        def spread(value: Any) -> Any:
            if isinstance(value, str):
                value = [value] * n
            return value[row.to(value.device)] if isinstance(value, Tensor) else [value[i] for i in row.tolist()]

        return cls(
            spread(prompts), spread(negatives) if negatives else None,
            [seeds[i] + j for i in range(n) for j in range(repeats)], row,
            {k: options[k] if k == "latents" else spread(options[k]) for k in lists if k in options},
        )  # fmt: skip

    def part(self, start: int, end: int) -> Call:
        """The images from ``start`` to ``end``."""
        cut = slice(start, end)
        return Call(
            self.prompts[cut], self.negatives and self.negatives[cut], self.seeds[cut], self.items[cut],
            {k: v[cut] for k, v in self.options.items()},
        )  # fmt: skip


class FullNoise(TorchFunctionMode):
    """While open, normal numbers of a generator are drawn in float32, whatever type they are wanted in.

    torch draws half-precision normals as another sequence than float32's, and one seed is one picture.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """As the function; a half-precision ``torch.randn`` is a float32 one, cast."""
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("dtype") in (torch.float16, torch.bfloat16):
            return func(*args, **{**kwargs, "dtype": torch.float32}).to(kwargs["dtype"])
        return func(*args, **kwargs)


def n_steps(options: Mapping[str, Any]) -> int:
    """Steps of the schedule that options of a call ask for."""
    own = next((options[k] for k in ("timesteps", "sigmas") if options.get(k) is not None), None)
    return options["steps"] if own is None else len(own)


def check_edits(host: DiffusionHost, options: Mapping[str, Any]) -> None:
    """Refuse edits that are open and cannot act in a call with these options.

    Raises:
        InputError: A window outside of the schedule, a text site that the pipeline does not consume, or embeddings are
            given, so that no text will be encoded.
    """
    n = n_steps(options)
    for e in host._edits:
        if e.steps and e.steps[1] > n:
            raise InputError(f"the edit of {e.target} holds at steps {e.steps}, but the schedule has {n} steps.")
        if e.target.modality != TEXT:
            continue
        if options.get("prompt_embeds") is not None:
            raise InputError(f"{e.target} is edited, but prompt_embeds are given: no text encoder will run.")
        skip = {k: options[k] for k in ("clip_skip",) if options.get(k) is not None}
        if not any(host.consumed(str(e.target), **skip)):
            host.check_consumed(str(e.target), **skip)


def run_call(
    host: DiffusionHost,
    call: Call,
    options: Mapping[str, Any],
    progress: bool = False,
    last: int | None = None,
) -> Any:
    """What the pipeline returns for the images of ``call``, with the edits of ``host`` that are open.

    Raises:
        Done: The denoiser is called after step ``last``.
    """
    pipeline, run = host.pipeline, Run(call.items, last)
    options = {**options, **call.options}
    run.windows = {e: e.steps for e in host._edits if e.steps and e.target.modality == TEXT}
    known = inspect.signature(type(pipeline).__call__).parameters
    bar = getattr(pipeline, "_progress_bar_config", {})
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(running(host, run))
        pipeline.set_progress_bar_config(**{**bar, "disable": not progress})
        stack.callback(pipeline.set_progress_bar_config, **bar)
        stack.enter_context(old_name(pipeline))
        both = guided(pipeline, options["guidance"], call.negatives, options)
        sets = list(dict.fromkeys(run.held(s) for s in range(n_steps(options))))
        found = {h: encode(pipeline, run, call.prompts, call.negatives, both, options, h) for h in sets}
        run.contexts = found if len(sets) > 1 else {}
        embeds = found[sets[0]]
        run.negative = embeds["negative_prompt_embeds"]
        if host._edits or host._probing:
            stack.enter_context(clock(pipeline, host.model[host.denoiser], run))
        given = {
            "num_inference_steps": options["steps"], "guidance_scale": options["guidance"], **embeds,
            "height": options.get("height"), "width": options.get("width"), "num_images_per_prompt": 1,
            "generator": [torch.Generator().manual_seed(s) for s in call.seeds],
        }  # fmt: skip
        if options.get("timesteps") is not None or options.get("sigmas") is not None:
            given["num_inference_steps"] = None
        given = {k: v for k, v in given.items() if k in known and v is not None}
        stack.enter_context(FullNoise())
        stack.enter_context(scheduler_errors(pipeline.scheduler, n_steps(options)))
        return pipeline(**given, **{k: v for k, v in options.items() if k not in _OURS})


@contextmanager
def scheduler_errors(scheduler: Any, steps: int) -> Iterator[None]:
    """What diffusers' scheduler itself raises, in a sentence that names it.

    Raises:
        InputError: In its place.
    """
    try:
        yield
    except Done:
        raise
    except Exception as e:
        inside = any(f.f_locals.get("self") is scheduler for f, _ in traceback.walk_tb(e.__traceback__))
        if not inside or isinstance(e, (InputError, MemoryError, torch.OutOfMemoryError)):
            raise
        raise InputError(
            f"the scheduler {type(scheduler).__name__} fails with {steps} steps ({reason(e)}): give another number of "
            "steps, or a pipeline with another scheduler or other settings in its scheduler_config.json."
        ) from e


@contextmanager
def running(host: DiffusionHost, run: Run) -> Iterator[None]:
    """``run`` is what the host is doing; compiled modules run eagerly where hooks have to see them."""
    before, host.run = host.run, run
    try:
        with eager(host) if host._edits or host._probing else nullcontext():
            yield
    finally:
        host.run = before


@contextmanager
def eager(host: DiffusionHost) -> Iterator[None]:
    """Without ``torch.compile``, where something is compiled: compiled code does not see hooks that came later."""
    global _warned
    wrapped = [getattr(host.pipeline, n) for n in host.model]
    if not any(_compiled(m) for m in (*wrapped, *host.model.modules())):
        yield
        return
    if not _warned:
        _warned = True
        warnings.warn(f"host {host.hint}: it is compiled, and runs without compilation while sites are read or edited.")
    with torch.compiler.set_stance("force_eager"):
        yield


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
