"""A pipeline and its calls: what a call is given, prompt by prompt, and what has to hold while it runs."""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmsae.errors import Warned
from mmsae.hosts.diffusion.call_state import CallState, clock
from mmsae.hosts.diffusion.edits import OpenEdit
from mmsae.hosts.diffusion.load import TEXT_ENCODERS, denoiser_name, parts
from mmsae.hosts.diffusion.prompts import EMBEDS, SECOND, PromptTokenizer, check_pipeline, encode, guided, old_name
from mmsae.hosts.hooks import Done
from mmsae.hosts.names import reason
from mmsae.hosts.sites import COND
from mmsae.types import TEXT, InputError

_PER_PROMPT = (*EMBEDS, *SECOND, "latents")  # options with one entry per prompt (latents: per image)
_OURS = {"guidance", "steps", "height", "width", *SECOND, *EMBEDS}  # not handed on as they are
_warned = False


class Call(NamedTuple):
    """Images to be made, one entry each."""

    prompts: list[str]
    negatives: list[str] | None  #: None for the pipeline's default.
    seeds: list[int]  #: Seeds of their noise.
    items: Tensor  #: ``(n,)`` which prompt of those that were given.
    options: dict[str, Any]  #: Options of the pipeline's call with one entry per image.

    @classmethod
    def of(
        cls,
        prompts: str | Sequence[str],
        negative: str | Sequence[str] | None,
        seed: int | Sequence[int],
        repeats: int,
        options: Mapping[str, Any],
    ) -> Call:
        """``repeats`` images of each prompt, next to each other, with seeds that count on."""
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

    torch draws half-precision normals as another sequence than float32's, and one seed is one image.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("dtype") in (torch.float16, torch.bfloat16):
            return func(*args, **{**kwargs, "dtype": torch.float32}).to(kwargs["dtype"])
        return func(*args, **kwargs)


def n_steps(options: Mapping[str, Any]) -> int:
    """Steps of the schedule that options of a call ask for."""
    own = next((options[k] for k in ("timesteps", "sigmas") if options.get(k) is not None), None)
    return options["steps"] if own is None else len(own)


@contextmanager
def scheduler_errors(scheduler: Any, steps: int) -> Iterator[None]:
    """What diffusers' scheduler itself raises becomes an InputError that names it."""
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


class Runner:
    """A pipeline of diffusers, and what it is doing.

    Args:
        pipeline: Any that makes images of texts alone.

    Attributes:
        denoiser: Name of its denoiser, ``unet`` or ``transformer``.
        model: Text encoders and denoiser by their names.
        tokenizers: ``{text encoder: its tokenizer}``.
        run: The call that is under way, or None.
    """

    def __init__(self, pipeline: Any):
        check_pipeline(pipeline)
        self.pipeline, self.denoiser, self.model = pipeline, denoiser_name(pipeline), parts(pipeline)
        names = [n for n in TEXT_ENCODERS if n in self.model]
        self.tokenizers = {n: getattr(pipeline, n.replace("text_encoder", "tokenizer")) for n in names}
        self.run: CallState | None = None

    @cached_property
    def tokenize(self) -> PromptTokenizer:
        """``tokenize(texts) -> (B, L)`` ids of all text encoders, side by side."""
        return PromptTokenizer.of(self.pipeline, self.tokenizers)

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return torch.device(self.pipeline._execution_device)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the denoiser was made for."""
        size = getattr(self.model[self.denoiser].config, "sample_size", None)
        size = getattr(self.pipeline, "default_sample_size", 64) if size is None else size
        return tuple(size) if isinstance(size, (list, tuple)) else (size, size)

    def read_texts(self, ids: Tensor, only: Collection[str]) -> dict[str, Any]:
        """What some text encoders, run as the pipeline does, return."""
        found = {}
        for name, own in self.tokenize.split(ids).items():
            if name in only:
                encoder, own = self.model[name], own.to(self.device)
                mask = own != self.tokenizers[name].pad_token_id
                masked = getattr(encoder.config, "use_attention_mask", False)
                found[name] = encoder(own, attention_mask=mask.long() if masked else None)
        return found

    def denoise(self, sample: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        """What the UNet of a pipeline with one text encoder predicts, differentiable by what open edits put in.

        Args:
            sample: ``(B, C, h, w)`` latents with noise.
            times: ``(B,)`` training times.
            ids: ``(B, L)`` token ids of the texts.
        """
        unet, run = self.model[self.denoiser], CallState(torch.arange(len(sample)))
        with self.running(run):
            with run.encoding(COND):
                states = self.read_texts(ids, {"text_encoder"})["text_encoder"][0]
            run.once(unet, sample)
            return unet(sample.to(unet.dtype), times, encoder_hidden_states=states.to(unet.dtype), return_dict=False)[0]

    def call(
        self,
        call: Call,
        options: Mapping[str, Any],
        edits: Sequence[OpenEdit] = (),
        watched: bool = True,
        progress: bool = False,
        last: int | None = None,
    ) -> Any:
        """What the pipeline returns for the images of a call.

        Args:
            call: The images.
            options: Arguments of the pipeline's call.
            edits: Those that are open.
            watched: Whether anybody is to see the call from inside.
            progress: Whether to show the pipeline's bar.
            last: A call of the denoiser after this step raises :class:`~mmsae.hosts.hooks.Done`.
        """
        pipeline, run = self.pipeline, CallState(call.items, last)
        options = {**options, **call.options}
        run.windows = {e: e.steps for e in edits if e.steps and e.target.modality == TEXT}
        known = inspect.signature(type(pipeline).__call__).parameters
        bar = getattr(pipeline, "_progress_bar_config", {})
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.running(run, watched))
            pipeline.set_progress_bar_config(**{**bar, "disable": not progress})
            stack.callback(pipeline.set_progress_bar_config, **bar)
            stack.enter_context(old_name(pipeline))
            both = guided(pipeline, options["guidance"], call.negatives, options)
            sets = list(dict.fromkeys(run.held(s) for s in range(n_steps(options))))
            found = {h: encode(pipeline, run, call.prompts, call.negatives, both, options, h) for h in sets}
            run.contexts = found if len(sets) > 1 else {}
            embeds = found[sets[0]]
            run.negative = embeds["negative_prompt_embeds"]
            if watched:
                stack.enter_context(clock(pipeline, self.model[self.denoiser], run))
            own = options.get("timesteps") is not None or options.get("sigmas") is not None
            given = {
                "num_inference_steps": None if own else options["steps"], "guidance_scale": options["guidance"],
                "height": options.get("height"), "width": options.get("width"), "num_images_per_prompt": 1,
                "generator": [torch.Generator().manual_seed(s) for s in call.seeds], **embeds,
            }  # fmt: skip
            given = {k: v for k, v in given.items() if k in known and v is not None}
            stack.enter_context(FullNoise())
            stack.enter_context(scheduler_errors(pipeline.scheduler, n_steps(options)))
            return pipeline(**given, **{k: v for k, v in options.items() if k not in _OURS})

    @contextmanager
    def running(self, run: CallState, watched: bool = True) -> Iterator[None]:
        """``run`` is what the pipeline is doing; compiled modules run eagerly where hooks have to see them."""
        before, self.run = self.run, run
        try:
            with self.eager() if watched else nullcontext():
                yield
        finally:
            self.run = before

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Without ``torch.compile``, where something is compiled: compiled code does not see hooks that came later."""
        global _warned
        wrapped = [getattr(self.pipeline, n) for n in self.model]
        modules = (*wrapped, *self.model.modules())
        if not any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
            yield
            return
        if not _warned:
            _warned = True
            name = type(self.pipeline).__name__
            warnings.warn(f"{name} is compiled, and runs without compilation while sites are read or edited.", Warned)
        with torch.compiler.set_stance("force_eager"):
            yield
