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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.errors import Warned
from mmsae.hosts.base import Host, Pick, Sites, check_device
from mmsae.hosts.capture import Picked, Use
from mmsae.hosts.diffusion.call import Call, Runner, n_steps
from mmsae.hosts.diffusion.call_state import CallState
from mmsae.hosts.diffusion.edits import OpenEdit
from mmsae.hosts.diffusion.load import TEXT_ENCODERS, layer_paths, part_config
from mmsae.hosts.diffusion.losses import Denoising, why_not
from mmsae.hosts.diffusion.prompts import PromptTokenizer
from mmsae.hosts.diffusion.sites import Consumed, Seen, consumed, look
from mmsae.hosts.diffusion.stream import BRANCHES, Branch, draw_steps, keeper, to_tokens
from mmsae.hosts.gradient import Gradient, HostLoss
from mmsae.hosts.hooks import Done, ModulePort, Port, watch_input
from mmsae.hosts.sites import Target, Where
from mmsae.hosts.tokens import Layout, check_policy, find_layout
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError, Site, Tokens

Steps = tuple[int, int]


class DiffusionHost(Host):
    """A frozen text-to-image pipeline.

    Args:
        pipeline: A pipeline of diffusers; its text encoders and denoiser are frozen here.
        hint: How to load it again.
        device: Device that it is moved to; None: it stays where it is.

    Attributes:
        denoiser: Name of its denoiser, ``unet`` or ``transformer``.
        tokenizers: ``{text encoder: its tokenizer}``.
        blanked: How many images the pipeline's safety checker has blanked so far.
    """

    modalities = (TEXT, IMAGE)

    def __init__(self, pipeline: Any, hint: str = "", device: str | torch.device | None = None):
        self._runner = Runner(pipeline)
        self.pipeline, self.denoiser, self.tokenizers = pipeline, self._runner.denoiser, self._runner.tokenizers
        self.blanked = 0
        self._reading = False
        self._edits: list[OpenEdit] = []
        self._seen: dict[str, Seen] = {}
        self._consumed: dict[Any, Consumed] = {}
        model = self._runner.model
        super().__init__(model, hint, pipeline.device if device is None else device)
        self.precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(model[self.denoiser].dtype, "fp32")

    # What it is.

    def config(self) -> dict[str, Any]:
        return {"pipeline": type(self.pipeline).__name__, **{n: part_config(m) for n, m in self.model.items()}}

    @property
    def device(self) -> torch.device:
        return self._runner.device

    @property
    def run(self) -> CallState | None:
        """The call that is under way, or None."""
        return self._runner.run

    @property
    def tokenize(self) -> PromptTokenizer:
        """``tokenize(texts) -> (B, L)`` ids of all text encoders, side by side."""
        return self._runner.tokenize

    def to(self, device: str | torch.device) -> DiffusionHost:
        """Move the pipeline; one that a device map or offloading has spread stays where it is."""
        check_device(device)
        spread = getattr(self.pipeline, "hf_device_map", None) or getattr(self.pipeline, "_all_hooks", None)
        if not spread and torch.device(device) != self.pipeline.device:
            self.pipeline.to(device)
        return self

    def reading(self, modalities: Collection[str], text: str = "question") -> dict[str, Any]:
        """How captions are read (:meth:`Host.reading`); activations of the denoiser come from :meth:`stream`."""
        if IMAGE in modalities:
            raise InputError(
                f"a diffusion pipeline reads no images: sites of {self.denoiser} are read while it generates: "
                "host.stream, or mmsae fit with the datamodule GenerationDataModule."
            )
        if text != "question":
            raise InputError(f"text is {text}, but host {self.hint} reads captions: it has no conversations")
        return {"transform": None, "tokenize": self.tokenize, "collate": None}

    @property
    def objectives(self) -> dict[str, HostLoss]:
        """``diffusion``: what :meth:`denoising` gives, for pipelines that it is offered for."""
        return {} if why_not(self._runner) else {"diffusion": self.denoising()}

    def objective(self, gradient: Gradient) -> HostLoss:
        return super().objective(self.denoising() if gradient == "diffusion" else gradient)

    def denoising(self, seed: int = 0) -> HostLoss:
        """Squared error at a random noise level, which ``seed`` and the uid of an item determine (:class:`Denoising`).

        Only pipelines built like Stable Diffusion 1.x have it; others are refused.
        """
        return Denoising(self._runner, self._edits, seed).objective()

    # Sites.

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
        target = self.target(site)
        key = (target.module, target.io, target.tokens, *sorted(options.items()))
        if key not in self._consumed:
            if target.modality == TEXT:
                with self.unseen():
                    found = consumed(self._runner, self.port(target.module, target.io), options)
            else:
                found = Consumed(context=True, pooled=False)
            self._consumed[key] = found
        return self._consumed[key]

    def check_consumed(self, site: Site | str, pooled: bool | None = None, **options: Any) -> Consumed:
        """Refuse a text site that cannot reach what the denoiser attends to; what it changes is returned.

        Args:
            site: A site of a text encoder (what the denoiser computes is always consumed).
            pooled: Accept one that changes only the pooled vector (the last block of SDXL's second encoder, the CLIP
                encoder of Flux); None: where the site itself is a pooled one (``text_encoder_2.text_projection:out``).
            **options: Arguments of the call that change what is consumed: ``clip_skip``.
        """
        target, found = self.target(site), self.consumed(site, **options)
        pooled = not target.has_tokens if pooled is None else pooled
        if found.context or (pooled and found.pooled):
            return found
        moves = "only the pooled vector changes, not" if found.pooled else "neither the pooled vector changes nor"
        raise InputError(
            f"site {target}: {type(self.pipeline).__name__} does not consume it as context: {moves} the states that "
            "the denoiser attends to; take an earlier layer."
        )

    def full_name(self, module: str) -> str:
        """Names of text layers are found whatever release of transformers is installed."""
        root, _, rest = module.partition(".")
        if self.modality_of(module) != TEXT or not rest:
            return module
        names = dict(self.model.named_modules())
        return next((p for p in (module, *layer_paths(root, rest)) if p in names), module)

    def modality_of(self, module: str, tokens: str = "all") -> str:
        return TEXT if module.partition(".")[0] in TEXT_ENCODERS else IMAGE

    def check_policy(self, target: Target, where: str) -> None:
        check_policy(target.tokens, target.layout, target.modality, False, where)
        if target.modality == IMAGE and target.tokens != "all" and target.has_tokens:
            why = "is not for the denoiser, whose sites have 'all'"
            raise InputError(f"{where}: token policy {target.tokens!r} {why}.")

    def measure(self, module: str, io: str) -> Layout:
        seen = self._look(module)
        if io == "update" and seen.inputs != seen.outputs:
            shapes = f"its input has shape {tuple(seen.inputs[0])} and its output {tuple(seen.outputs[0])}"
            raise InputError(f"{module} cannot be a site with io 'update' when {shapes}.")
        return find_layout(*(seen.inputs if io == "in" else seen.outputs), channels_last=False, where=f"{module}:{io}")

    def _look(self, module: str) -> Seen:
        if module not in self._seen:
            self.module(module)  # raises where there is none, with near matches
            with self.unseen():
                self._seen[module] = look(self._runner, module)
        return self._seen[module]

    def port(self, module: str, io: str) -> Port:
        return ModulePort(self.module(module), io, self._look(module).key)

    @contextmanager
    def picking(self, target: Target, edit: OpenEdit | None = None) -> Iterator[Pick]:
        edit, ids = edit or OpenEdit(target), []
        part = target.module.partition(".")[0]

        def pick(x: Tensor) -> Picked | None:
            run = self.run
            unknown = run is None and not self._reading if target.modality == TEXT else run is None or run.step is None
            if unknown:
                raise InputError(f"site {target} is edited, but the pipeline was called directly: call host.generate.")
            return edit.pick(x, run, ids, self.tokenizers.get(part))

        with ExitStack() as stack:
            if target.modality == TEXT and target.has_tokens:
                stack.enter_context(watch_input(self.model[part], ids))
            yield pick

    # Editing and generating.

    def edit(
        self, site: Site | str, fn: Callable[..., Tensor], *, where: bool = False, steps: Steps | None = None
    ) -> AbstractContextManager[None]:
        """Edit a site (:meth:`Host.edit`) in :meth:`generate`, :meth:`stream` and, at text sites, :meth:`capture`.

        Args:
            site: The site. Two edits of one site run in the order in which they were opened.
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
        opened = OpenEdit(self.target(site), steps and (int(steps[0]), int(steps[1])))
        return self._open(opened, lambda rows, at: fn(rows, at) if where else fn(rows))

    @contextmanager
    def _open(self, edit: OpenEdit, fn: Use) -> Iterator[None]:
        with self.tapped(edit.target, fn, edit):
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

        Every image has a random generator of its own, on the CPU, so that a prompt alone gives the image that it
        gives in a batch, on any device.

        Args:
            prompts: Texts.
            negative: Texts to guide away from, one for all or one per prompt; None: what the pipeline takes then.
            steps: Number of denoising steps.
            guidance: Guidance scale; up to 1 (or with a guidance-distilled model) there is no unconditional branch.
            seed: One number gives every prompt the same noise; a sequence has one per prompt. The images of one prompt
                count on from its seed.
            height: Height of the images in pixels; None: the pipeline's.
            width: Their width, likewise.
            batch_size: Images per call.
            num_images_per_prompt: They follow each other.
            progress: Whether to show the pipeline's bar.
            output_type: ``pt``, or ``latent`` for latents.
            **options: Arguments of the pipeline's call: ``clip_skip``, ``prompt_2``, ``true_cfg_scale``, ``latents``,
                ``eta``, ``prompt_embeds`` (prompts are then only counted), ...

        Returns:
            ``(B, 3, H, W)`` float32 in [0, 1] on the CPU, or latents.
        """
        call = Call.of(prompts, negative, seed, num_images_per_prompt, options)
        options |= {"guidance": guidance, "steps": steps, "height": height, "width": width, "output_type": output_type}
        self._check_edits(options)
        out = []
        for lo in range(0, len(call.items), batch_size):
            part = call.part(lo, lo + batch_size)
            made = self._runner.call(part, options, self._edits, bool(self._edits), progress)
            self._count_blanked(getattr(made, "nsfw_content_detected", None))
            out.append(made.images.float().cpu())
        return torch.cat(out)

    def _check_edits(self, options: dict[str, Any]) -> None:
        """Refuse edits that are open and cannot act in a call with these options."""
        n = n_steps(options)
        for e in self._edits:
            if e.steps and e.steps[1] > n:
                raise InputError(f"the edit of {e.target} holds at steps {e.steps}, but the schedule has {n} steps.")
            if e.target.modality != TEXT:
                continue
            if options.get("prompt_embeds") is not None:
                raise InputError(f"{e.target} is edited, but prompt_embeds are given: no text encoder will run.")
            skip = {k: options[k] for k in ("clip_skip",) if options.get(k) is not None}
            if not any(self.consumed(str(e.target), **skip)):
                self.check_consumed(str(e.target), **skip)

    def _count_blanked(self, flags: Sequence[bool] | None) -> None:
        n = sum(map(bool, flags or ()))
        if n:
            self.blanked += n
            warnings.warn(
                f"the safety checker of {self.hint or 'the pipeline'} blanked {n} of {len(flags)} images.", Warned
            )

    # Reading.

    def stream(
        self,
        prompts: Sequence[str],
        sites: Site | str | Sites,
        *,
        steps: int = 20,
        sample_steps: int | Sequence[int] | None = None,
        positions: int | None = None,
        branch: Branch = "cond",
        guidance: float = 3.0,
        seed: int | Sequence[int] = 0,
        negative: str | Sequence[str] | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> Iterator[Tokens]:
        """Activations while images are made of prompts; a call of the pipeline ends after the last step wanted.

        Args:
            prompts: Texts.
            sites: One site, or one per modality; text sites are read while prompts are encoded.
            steps: Number of denoising steps.
            sample_steps: How many of them are read, drawn anew for every call; or which; None: all.
            positions: How many positions of an image are read at a step, drawn anew for every call and step; None: all.
            branch: Guidance branch that is read: ``cond``, ``uncond`` or ``all``.
            guidance: Guidance scale; statistics should be taken at that of the steering to come.
            seed: Seed of noise and draws, as in :meth:`generate`: one number is the same noise for every prompt.
            negative: Texts to guide away from, as in :meth:`generate`.
            batch_size: Images per call.
            **options: Further arguments of the pipeline's call.

        Yields:
            Tokens of one call: ``item`` counts the prompts of that call, ``uids`` are their numbers among all prompts,
            ``position`` is row by row in the map.
        """
        read = {"sample_steps": sample_steps, "positions": positions, "branch": branch, "batch_size": batch_size}
        options |= {"steps": steps, "guidance": guidance, "seed": seed, "negative": negative}
        for found in self.stream_each(prompts, {"": sites}, **read, **options):
            yield found[""]

    def stream_each(
        self,
        prompts: Sequence[str],
        choices: Mapping[str, Site | str | Sites],
        *,
        steps: int,
        guidance: float,
        sample_steps: int | Sequence[int] | None = None,
        positions: int | None = None,
        branch: Branch = "cond",
        seed: int | Sequence[int] = 0,
        negative: str | Sequence[str] | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> Iterator[dict[str, Tokens]]:
        """What :meth:`stream` gives at each of several choices of sites, ``{name: Tokens}``, of the same images."""
        chosen = {name: self.one_each(sites) for name, sites in choices.items()}
        if branch not in BRANCHES:
            raise InputError(f"branch {branch!r} is not one of {', '.join(BRANCHES)}.")
        options |= {"steps": steps, "guidance": guidance, "output_type": "latent"}
        call = Call.of(prompts, negative, seed, 1, options)
        self._check_edits(options)
        for lo in range(0, len(call.items), batch_size):
            part = call.part(lo, lo + batch_size)
            got: dict[str, dict[str, list[tuple[Tensor, Where]]]] = {}
            last = -1
            with suppress(Done), ExitStack() as stack:
                for name, own in chosen.items():
                    draw = torch.Generator().manual_seed(part.seeds[0] * 1_000_003 + lo)
                    wanted = draw_steps(sample_steps, n_steps(options), draw)
                    got[name] = {m: [] for m in own}
                    for m, site in own.items():
                        keep = keeper(got[name][m], BRANCHES[branch], m == IMAGE, positions, draw)
                        read = OpenEdit(self.target(site), at=wanted if m == IMAGE else None)
                        stack.enter_context(self._open(read, keep))
                    last = max(wanted) if IMAGE in own else last
                self._runner.call(part, options, self._edits, last=last)
            for name, own in got.items():
                if unread := [m for m, rows in own.items() if not rows]:
                    why = f"branch {branch!r} does not run at guidance {guidance}"
                    raise InputError(f"nothing was read at {chosen[name][unread[0]]}: {why}.")
            yield {name: to_tokens(own, part.items) for name, own in got.items()}

    def passes(self, batch: ImageTextBatch, targets: Sequence[Target]) -> list[tuple[list[int], Callable[[], Any]]]:
        if any(t.modality == IMAGE for t in targets):
            how = "they are read while it generates (host.stream), or with gradient 'diffusion'"
            raise InputError(f"no captions give sites of {self.denoiser}: {how}.")
        if batch.texts is None:
            raise InputError("a site reads the texts of a batch that has none.")
        encoders = {t.module.partition(".")[0] for t in targets}
        return [(list(range(len(targets))), partial(self._read_texts, batch.texts, encoders))]

    @torch.no_grad()
    def _read_texts(self, ids: Tensor, encoders: Collection[str]) -> None:
        before, self._reading = self._reading, True
        try:
            with self._runner.eager():
                self._runner.read_texts(ids, encoders)
        finally:
            self._reading = before
