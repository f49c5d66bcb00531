"""Diffusion pipelines of diffusers as frozen hosts: Stable Diffusion 1.x, XL and Turbo, 3, Flux, and what is like them.

Sites are modules in the pipeline's own naming: ``text_encoder.layers.9:out[content]``,
``unet.up_blocks.0.attentions.1:update``, ``unet...attn2:out``, ``transformer.transformer_blocks.3:out``. Text sites
have token policies (``content``, ``eos``, ``pad``, ``mask``, ``all``); sites of the denoiser hold image tokens, all of
them.

The pipeline's own call runs; what branch, step and prompt a row belongs to is learnt on the way
(:mod:`mmsae.hosts.diffusion.call_state`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.hosts.base import Host, Sites, check_device
from mmsae.hosts.capture import Rows
from mmsae.hosts.diffusion.call import Call, check_edits, run_call
from mmsae.hosts.diffusion.call_state import Run
from mmsae.hosts.diffusion.load import TEXT_ENCODERS, denoiser_name, part_config, parts
from mmsae.hosts.diffusion.prompts import PromptTokenizer, check_pipeline
from mmsae.hosts.diffusion.sites import Consumed, accept, consumed, look, read, resolve
from mmsae.hosts.diffusion.tap import Edit, Seen, tap
from mmsae.hosts.hooks import ModulePort, Port
from mmsae.hosts.sites import Target, find_port
from mmsae.hosts.tokens import Layout, Marks, find_layout
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError, Site, Tokens

NO_IMAGES = "a diffusion pipeline reads no images"


class TextToImage(Host):
    """A host that makes images of texts and embeds neither."""

    @property
    def endpoints(self) -> tuple[str, ...]:
        """None: sites are modules."""
        return ()

    def transform(self, train: bool = False) -> Callable:
        """Refused."""
        raise InputError(f"{NO_IMAGES}: host {self.hint} has no image transform.")

    def encode_image(self, images: Tensor) -> Tensor:
        """Refused."""
        raise InputError(f"{NO_IMAGES}: host {self.hint} has no image encoder.")

    def encode_text(self, ids: Tensor) -> Tensor:
        """Refused: there is no embedding of a text here, only states of its tokens."""
        raise InputError(f"host {self.hint} has no text embedding: read a site like text_encoder.final_layer_norm:out.")

    def _endpoint(self, name: str) -> Port:
        raise NotImplementedError("there are no endpoints")

    def _marks(self, modality: str, tokens: Tensor, ids: Tensor | None, is_map: bool) -> Marks:
        raise NotImplementedError("taps mark their tokens themselves")

    def _has_cls(self, modality: str) -> bool:
        return False

    def _probe_input(self, modality: str, n: int) -> Tensor:
        return self.tokenize([""] * n)


Steps = tuple[int, int]


class DiffusionHost(TextToImage):
    """A frozen text-to-image pipeline.

    Args:
        pipeline: Of diffusers; its text encoders and denoiser are frozen here.
        hint: How to load it again.
        device: Where it runs; None where it is.

    Attributes:
        pipeline: As given.
        denoiser: Name of its denoiser, ``unet`` or ``transformer``.
        tokenizers: ``{text encoder: its tokenizer}``.
        run: The call that is under way, or None.
        blanked: How many images the pipeline's safety checker has blanked so far.
    """

    modalities = (TEXT, IMAGE)

    def __init__(self, pipeline: Any, hint: str = "", device: str | torch.device | None = None):
        check_pipeline(pipeline)
        self.pipeline, self.denoiser = pipeline, denoiser_name(pipeline)
        self.run: Run | None = None
        self._reading = False
        self.blanked = 0
        self._edits: list[Edit] = []
        self._seen: dict[str, Seen] = {}
        self._consumed: dict[Any, Consumed] = {}
        model = parts(pipeline)
        super().__init__(model, hint, pipeline.device if device is None else device)
        self.precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(model[self.denoiser].dtype, "fp32")
        names = [n for n in TEXT_ENCODERS if n in model]
        self.tokenizers = {n: getattr(pipeline, n.replace("text_encoder", "tokenizer")) for n in names}

    # What it is.

    def config(self) -> dict[str, Any]:
        """Class of the pipeline, configurations of its text encoders and its denoiser."""
        return {"pipeline": type(self.pipeline).__name__, **{n: part_config(m) for n, m in self.model.items()}}

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return torch.device(self.pipeline._execution_device)

    def _image_area(self) -> None:
        return None  # captions are read; what the denoiser computes has a batch size of its own

    def to(self, device: str | torch.device) -> DiffusionHost:
        """Move the pipeline; one that a device map or offloading has spread stays where it is."""
        check_device(device)
        spread = getattr(self.pipeline, "hf_device_map", None) or getattr(self.pipeline, "_all_hooks", None)
        if not spread and torch.device(device) != self.pipeline.device:
            self.pipeline.to(device)
        return self

    @cached_property
    def tokenize(self) -> PromptTokenizer:
        """``tokenize(texts) -> (B, L)`` ids of all text encoders, side by side."""
        return PromptTokenizer.of(self.pipeline, self.tokenizers)

    @property
    def context_length(self) -> int:
        """Token ids of one text, over all encoders."""
        return self.tokenize.context_length

    def reading(self, modalities: Collection[str], text: str = "question") -> dict[str, Any]:
        """As :meth:`Host.reading`: captions; activations of the denoiser come from :meth:`stream`."""
        if IMAGE in modalities:
            raise InputError(
                f"{NO_IMAGES}: sites of {self.denoiser} are read while it generates: host.stream, or mmsae fit with "
                "the datamodule GenerationDataModule."
            )
        return super().reading(modalities, text)

    # Sites.

    def site(self, spec: str | Site, allow_other_site: bool = False) -> Site:
        """As :meth:`Host.site`; names of text layers are found whatever release of transformers is installed."""
        if isinstance(spec, Site):
            return self.check_site(spec, allow_other_site)
        t = resolve(self, spec)
        return Site(self.fingerprint, t.module, t.io, t.tokens, t.modality, t.layout.width, self.hint)

    def default_sites(self) -> dict[str, Site]:
        """The last but one layer of the first text encoder whose states reach the denoiser as context."""
        for name in self.tokenizers:
            layers = max((m for m in self.model[name].modules() if isinstance(m, nn.ModuleList)), key=len)
            site = self.site(f"{name}.layers.{max(0, len(layers) - 2)}:out[mask]")
            if self.consumed(site).context:
                return {TEXT: site}
        raise InputError(f"no text encoder of host {self.hint} reaches its denoiser as context.")

    def consumed(self, site: Site | str, **options: Any) -> Consumed:
        """Which inputs of the denoiser change when a text site does, found by trying; ``options``: ``clip_skip``."""
        target = self._target(site)
        key = (target.module, target.io, target.tokens, *sorted(options.items()))
        if key not in self._consumed:
            self._consumed[key] = consumed(self, target, options)
        return self._consumed[key]

    def check_consumed(self, site: Site | str, pooled: bool | None = None, **options: Any) -> Consumed:
        """Refuse a text site that cannot reach what the denoiser attends to.

        Args:
            site: Of a text encoder (what the denoiser computes is always consumed).
            pooled: Accept one that changes only the pooled vector (the last block of SDXL's second encoder, the CLIP
                encoder of Flux); None: where the site itself is a pooled one (``text_encoder_2.text_projection:out``).
            **options: Of the call that change what is consumed: ``clip_skip``.

        Returns:
            What changes.

        Raises:
            InputError: Nothing does, or the pooled vector alone.
        """
        return accept(self, self._target(site), self.consumed(site, **options), pooled)

    def _target(self, site: Site | str) -> Target:
        s = self.site(site)
        return resolve(self, f"{s.module}:{s.io}[{s.tokens}]")

    def _modality(self, module: str) -> str:
        return TEXT if module.split(".")[0] in TEXT_ENCODERS else IMAGE

    def _layout(self, module: str, io: str, modality: str) -> Layout:
        seen = self._look(module)
        if io == "update" and seen.inputs != seen.outputs:
            shapes = f"its input has shape {tuple(seen.inputs[0])} and its output {tuple(seen.outputs[0])}"
            raise InputError(f"{module} cannot be a site with io 'update' when {shapes}.")
        return find_layout(*(seen.inputs if io == "in" else seen.outputs), channels_last=False, where=f"{module}:{io}")

    def _look(self, module: str) -> Seen:
        if module not in self._seen:
            find_port(self, module, "out")  # raises where there is none, with near matches
            self._seen[module] = look(self, module)
        return self._seen[module]

    def _port(self, module: str, io: str) -> Port:
        return ModulePort(self.model.get_submodule(module), io, self._look(module).key)

    # Editing and generating.

    def edit(
        self, site: Site | str, fn: Callable[..., Tensor], *, where: bool = False, steps: Steps | None = None
    ) -> AbstractContextManager[None]:
        """As :meth:`Host.edit`; holds for :meth:`generate`, :meth:`stream` and, at text sites, :meth:`capture`.

        Args:
            site: Where. Two edits of one site run in the order in which they were opened.
            fn: ``fn(rows)``, rows of all branches; it must not change them in place. The same object changes nothing.
            where: Call ``fn(rows, where)`` with a :class:`~mmsae.hosts.sites.Where`: ``branch``, ``item`` (which
                prompt), ``position`` and ``special``, and, in the denoiser, ``step`` and ``grid``.
            steps: ``(start, end)``: steps, from 0 and without ``end``, at which it holds. Text is encoded once with and
                once without the edit, and the denoiser is given the one or the other.

        Raises:
            InputError: No such site, or (in ``generate``) a window outside of the schedule, or a text site that the
                pipeline does not consume.
        """
        if steps is not None and not 0 <= steps[0] < steps[1]:
            raise InputError(f"steps is {tuple(steps)}: a window (start, end) has 0 <= start < end.")
        opened = Edit(self._target(site), steps and (int(steps[0]), int(steps[1])))
        return self._open(opened, lambda rows, at: fn(rows, at) if where else fn(rows))

    @contextmanager
    def _open(self, edit: Edit, fn: Callable[..., Tensor]) -> Iterator[None]:
        with tap(self, edit, fn):
            self._edits.append(edit)
            try:
                yield
            finally:
                self._edits.remove(edit)

    def active_sites(self) -> list[str]:
        """Sites with an edit that is open."""
        return [str(e.target) for e in self._edits]

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative: str | Sequence[str] | None = None,
        steps: int = 20,
        guidance: float = 3.0,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        num_images_per_prompt: int = 1,
        progress: bool = False,
        output_type: str = "pt",
        **options: Any,
    ) -> Tensor:
        """Images by the pipeline's own call; edits that are open hold.

        Every image has a random generator of its own, on the CPU, so that a prompt alone gives the picture that it
        gives in a batch, on any device.

        Args:
            prompts: Texts.
            negative: Texts to guide away from, one for all or one per prompt; None: what the pipeline takes then.
            steps: Of the scheduler.
            guidance: Guidance scale; up to 1 (or with a guidance-distilled model) there is no unconditional branch.
            seed: One number gives every prompt the same noise; a sequence has one per prompt. The images of one prompt
                count on from its seed.
            height: Of the images, in pixels; None: the pipeline's.
            width: As height.
            batch_size: Images per call.
            num_images_per_prompt: They follow each other.
            progress: Whether to show the pipeline's bar.
            output_type: ``pt``, or ``latent`` for latents.
            **options: Of the pipeline's call: ``clip_skip``, ``prompt_2``, ``true_cfg_scale``, ``latents``, ``eta``,
                ``prompt_embeds`` (prompts are then only counted), ...

        Returns:
            ``(B, 3, H, W)`` float32 in [0, 1] on the CPU, or latents.

        Raises:
            InputError: Numbers of prompts, seeds or negatives disagree, or see :meth:`edit`.
        """
        call = Call.of(prompts, negative, seed, num_images_per_prompt, options)
        options |= {"guidance": guidance, "steps": steps, "height": height, "width": width, "output_type": output_type}
        check_edits(self, options)
        out = []
        for lo in range(0, len(call.items), batch_size):
            made = run_call(self, call.part(lo, lo + batch_size), options, progress)
            self._count_blanked(getattr(made, "nsfw_content_detected", None))
            out.append(made.images.float().cpu())
        return torch.cat(out)

    def _count_blanked(self, flags: Sequence[bool] | None) -> None:
        n = sum(map(bool, flags or ()))
        if n:
            self.blanked += n
            warnings.warn(f"the safety checker of {self.hint or 'the pipeline'} blanked {n} of {len(flags)} images.")

    # Reading.

    def stream(self, prompts: Sequence[str], sites: Site | str | Sites, **options: Any) -> Iterator[Tokens]:
        """Activations while images are made of prompts, see :func:`mmsae.hosts.diffusion.stream.stream`."""
        from mmsae.hosts.diffusion.stream import stream

        return stream(self, prompts, sites, **options)

    def read(self, batch: ImageTextBatch, sites: Sequence[Site | str]) -> list[Rows]:
        """Rows at several text sites, in their order, from the captions' ids."""
        return read(self, batch, [self._target(s) for s in sites])

    def capture(self, batch: ImageTextBatch, sites: Sites | None = None) -> Tokens:
        """As :meth:`Host.capture`, of text sites; default: :meth:`default_sites`."""
        return super().capture(batch, self.default_sites() if sites is None else sites)

    def _encode(self, modality: str, x: Tensor, only: Collection[str] | None = None) -> Tensor:
        """Run the text encoders (``only`` some) as the pipeline does; the last one's states."""
        states = None
        for name, ids in self.tokenize.split(x).items():
            if only is None or name in only:
                encoder, ids = self.model[name], ids.to(self.device)
                mask = ids != self.tokenizers[name].pad_token_id
                masked = getattr(encoder.config, "use_attention_mask", False)
                states = encoder(ids, attention_mask=mask.long() if masked else None)[0]
        return states
