"""Vision-language models of transformers (:mod:`mmsae.hosts.lvlm.families`) as frozen hosts.

One sequence holds image and text tokens, so a site here is a module of the language model and a token policy
(:mod:`mmsae.hosts.lvlm.tokens`): ``layers.16:out[image]``, ``layers.16:out[text]``, ``layers.30:in[text_mean]``.
``layers.N`` is short for the model's own path. Modules of the vision tower are sites, too, with the policies ``all``,
``patches`` and ``cls``: of a tensor ``(images or tiles, tokens, width)``. Batches come from :attr:`LVLMHost.collate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmsae.hosts.base import Host, Pick, Sites
from mmsae.hosts.capture import Picked
from mmsae.hosts.gradient import Gradient, HostLoss
from mmsae.hosts.hooks import Done
from mmsae.hosts.loaded import plain_config
from mmsae.hosts.lvlm.cache import cached
from mmsae.hosts.lvlm.image_grid import ImageGrid, check_processor, has_cls, image_id, layouts, place
from mmsae.hosts.lvlm.load import decoder_path
from mmsae.hosts.lvlm.packing import PLACES, SEGMENTS, Packer, own_attention
from mmsae.hosts.lvlm.prompt import Collator, TextChoice
from mmsae.hosts.lvlm.tokens import (
    MEANS,
    PATCH,
    POLICIES,
    MeansSoFar,
    PickedMeans,
    Vocabulary,
    flagged,
    kinds_of,
    select,
)
from mmsae.hosts.sites import Target, Where
from mmsae.hosts.tokens import Layout, to_tokens
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError, Site, Tokens

TOWER_POLICIES = ("all", "patches", "cls")


class TextLoss(NamedTuple):
    """Cross-entropy of next-token predictions."""

    ce: Tensor  #: ``(N,)`` nats, one per predicted token.
    item: Tensor  #: ``(N,)`` which item of the batch.
    position: Tensor  #: ``(N,)`` position of the predicted token.


def recovered(original: float, reconstructed: float, zeroed: float) -> float:
    """Share of the cross-entropy that zeroed states lose which reconstructed ones keep: 1 is perfect."""
    return (zeroed - reconstructed) / (zeroed - original)


class LVLMHost(Host):
    """A frozen vision-language model.

    Edits hold in prefill and in decoding with a cache. While one token at a time is decoded, text rows are the new
    tokens and image rows do not come again. A site of means shifts every averaged token by the change of the mean;
    decoding, the mean is that of all tokens so far and the new token is shifted by its change, while those in the cache
    keep the shift of their own step (beam search reorders the cache unseen: use means with one beam).

    Args:
        model: ``...ForConditionalGeneration`` of transformers.
        processor: The model's processor.
        hint: How to load it again.
        device: Device that it is moved to; None: it stays where it is (spread by a device map, say).

    Attributes:
        vocabulary: Ids of image and special tokens.
        collate: Makes batches of samples, for ``Reader.of(..., collate=)``; :meth:`collator` makes others.
        decoder: Module path of the language model, ``model.language_model``.
    """

    modalities = (IMAGE, TEXT)

    def __init__(self, model: nn.Module, processor: Any, hint: str = "", device: str | torch.device | None = None):
        check_processor(processor, model, hint)
        self.processor, self._known, self._packed = processor, None, None
        self.decoder = decoder_path(model)
        super().__init__(model, hint, model.device if device is None else device)
        image = getattr(model.config, "image_token_id", None)
        image = image_id(processor) if image is None else image
        self.vocabulary = Vocabulary.of(processor.tokenizer, image, (image,))
        text = model.config.get_text_config()
        self.n_layers, self.hidden_size = text.num_hidden_layers, text.hidden_size
        self.context_length = min(text.max_position_embeddings, processor.tokenizer.model_max_length)
        self.collate = self.collator()

    def collator(self, text: TextChoice = "question", padding_side: str = "left") -> Collator:
        """What makes batches; holds no weights. ``text``: whether answers are part of the sequence."""
        return Collator(self.processor, self.vocabulary, self.context_length, text, padding_side)

    def packer(self, collator: Collator, separate: bool) -> Packer:
        """What packs the conversations of a batch into blocks, for models in which that is known to be right.

        ``separate``: each conversation sees itself alone, which takes a mask that the model's attention must take.
        """
        text, why = self.model.config.get_text_config(), ""
        if self._finds_positions:
            why = "it finds the positions of its images itself, one conversation a sequence"
        elif "token_type_ids" in self._accepted:
            why = "tokens of an image see each other both ways, which a mask of blocks does not say"
        elif separate and text._attn_implementation not in ("eager", "sdpa"):
            why = f"its attention is {text._attn_implementation}, which takes no mask of blocks (eager and sdpa do)"
        elif separate and (getattr(text, "sliding_window", None) or 1e9) < collator.context_length:
            why = f"its attention slides over {text.sliding_window} tokens, which a mask of blocks would widen"
        if why:
            raise InputError(f"packing: host {self.hint} cannot pack conversations: {why}; take packing none")
        return Packer(collator, separate)

    def reading(self, modalities: Collection[str], text: str = "question") -> dict[str, Any]:
        return {"transform": None, "tokenize": None, "collate": self.collator(text)}

    def prompt(self, question: str, answer: str | None = None, images: int = 1) -> str:
        """The text of a prompt, by the processor's chat template where it has one."""
        return self.collate.prompt(question, answer, images)

    def config(self) -> dict[str, Any]:
        return plain_config(self.model.config.to_dict())

    def image_area(self) -> int:
        side = getattr(self.model.config.vision_config, "image_size", None)
        return side**2 if isinstance(side, int) else 224**2  # of any size, as it comes

    def to(self, device: str | torch.device) -> Host:
        """Move the host; one that a device map has spread stays where it is."""
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            return self
        return super().to(device)

    # Sites.

    def sites(self, spec: str) -> dict[str, Site]:
        """Both segments of a module: ``"layers.2:out"`` is ``{image: ...[image], text: ...[text]}``."""
        spec = spec.partition("[")[0]
        return {m: self.site(f"{spec}[{m}]") for m in self.modalities}

    def default_sites(self) -> dict[str, Site]:
        """Image and text tokens of the residual stream after half of the layers."""
        return self.sites(f"layers.{max(0, self.n_layers // 2 - 1)}:out")

    def _decodes(self, module: str) -> bool:
        """Whether a module is part of the language model."""
        return f"{module}.".startswith(f"{self.decoder}.")

    def full_name(self, module: str) -> str:
        names = dict(self.model.named_modules())
        module = next((m for m in (module, f"{self.decoder}.{module}", f"model.{module}") if m in names), module)
        self.module(module)  # raises where there is none, with near matches
        in_tower = any(part.startswith("vis") for part in module.split("."))  # vision_tower, vision_model, visual
        if not self._decodes(module) and not in_tower:
            whose = f"neither of the language model {self.decoder} nor of a vision tower"
            raise InputError(f"site {module}: it is part {whose}.")
        return module

    def modality_of(self, module: str, tokens: str = "all") -> str:
        return POLICIES.get(tokens, TEXT) if self._decodes(module) else IMAGE

    def check_policy(self, target: Target, where: str) -> None:
        decodes = self._decodes(target.module)
        known, whose = (tuple(POLICIES), "the language model") if decodes else (TOWER_POLICIES, "a vision tower")
        if target.tokens not in known:
            raise InputError(f"{where}: token policy {target.tokens!r} is not one of {', '.join(known)} of {whose}.")
        if not decodes and target.tokens == "cls" and not has_cls(self.model):
            raise InputError(f"{where}: this vision tower has no class token.")

    def probe(self, module: str, n: int) -> None:
        words = [i for i in range(len(self.vocabulary.special) + 1) if i not in self.vocabulary.special]
        with torch.no_grad():
            self.model(input_ids=torch.full((n, 3), words[0], device=self.device), use_cache=False)

    def measure(self, module: str, io: str) -> Layout:
        """What a vision tower gives is seen by showing it one blank image."""
        if self._decodes(module):
            return super().measure(module, io)
        from PIL import Image

        seen: list[torch.Size] = []

        def note(x: Tensor) -> Tensor:
            seen.append(x.shape)
            raise Done

        side = getattr(self.model.config.vision_config, "image_size", None)
        side = side if isinstance(side, int) else 224
        batch = self.collate.batch(["?"], [Image.new("RGB", (side, side))])
        with suppress(Done), self.port(module, io).attach(note):
            self.forward(batch)
        if not seen:
            raise InputError(f"{module}:{io} cannot be a site: no image reaches it.")
        if len(seen[0]) != 3:
            shape = tuple(seen[0])
            raise InputError(f"{module}:{io} cannot be a site: its shape is {shape}, not (images, tokens, width).")
        return Layout(3, 0, 2, seen[0][2])

    # Running it.

    @contextmanager
    def _about(self, batch: ImageTextBatch) -> Iterator[dict[str, Tensor]]:
        """The model's arguments of a batch; what its tokens are is known while the context is open."""
        if batch.inputs is None:
            raise InputError(f"host {self.hint} needs batches of its own collate; this one has no processor inputs.")
        accepted, before = self._accepted, (self._known, self._packed)
        self._known, self._packed = batch.inputs.get("kinds"), batch.inputs if SEGMENTS in batch.inputs else None
        try:
            yield {
                k: v.to(self.device, self.model.dtype if v.is_floating_point() else None, non_blocking=True)
                for k, v in batch.inputs.items()
                if k in accepted
            }
        finally:
            self._known, self._packed = before

    @property
    def _finds_positions(self) -> bool:
        """Whether the model finds the positions of its tokens itself, of images in two dimensions (Qwen-VL)."""
        return hasattr(getattr(self.model, "model", None), "get_rope_index")

    @cached_property
    def _accepted(self) -> set[str]:
        return set(inspect.signature(self.model.forward).parameters)

    @torch.no_grad()
    def forward(self, batch: ImageTextBatch, **options: Any) -> Any:
        """The model's own output for a batch, without cache; ``logits`` are ``(B, L, V)``."""
        return self._forward(batch, **options)

    def _forward(self, batch: ImageTextBatch, **options: Any) -> Any:
        with self._about(batch) as inputs:
            if "position_ids" in inputs:
                inputs["attention_mask"] = own_attention(batch.inputs[SEGMENTS].to(self.device), self.model.dtype)
            elif not self._finds_positions:
                position = inputs["attention_mask"].long().cumsum(1) - 1
                inputs["position_ids"] = position.clamp(min=0)
            return self.model(**inputs, use_cache=False, **options)

    @torch.no_grad()
    def generate(self, batch: ImageTextBatch, **options: Any) -> Any:
        """The model's own ``generate``; edits that are open hold in prefill and decoding."""
        pad, eos = self.processor.tokenizer.pad_token_id, self.processor.tokenizer.eos_token_id
        options.setdefault("pad_token_id", eos if pad is None else pad)
        with self._about(batch) as inputs:
            if (inputs["attention_mask"][:, -1] == 0).any():
                raise InputError("generation needs prompts that are padded on the left: collator(padding_side='left').")
            return self.model.generate(**inputs, **options)

    def answer(self, batch: ImageTextBatch, **options: Any) -> list[str]:
        """What the model says to each prompt, decoded, without special tokens; greedy by default."""
        options.setdefault("do_sample", False)
        ids = self.generate(batch, **options)
        ids = getattr(ids, "sequences", ids)[:, batch.inputs["input_ids"].shape[1] :]
        return [s.strip() for s in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    # Reading and replacing.

    def capture(self, batch: ImageTextBatch, sites: str | Sites | None = None, gradient: Gradient = "") -> Tokens:
        """Image and text segments of a batch of :attr:`collate`, as :meth:`Host.capture`.

        ``sites`` may be a module, whose ``image`` and ``text`` tokens are taken (``"layers.2:out"``). A segment may be
        empty (prompts without image).
        """
        if isinstance(sites, str):
            sites = self.sites(sites) if "[" not in sites else [sites]
        return super().capture(batch, self.default_sites() if sites is None else sites, gradient)

    def passes(self, batch: ImageTextBatch, targets: Sequence[Target]) -> list[tuple[list[int], Callable[[], Any]]]:
        return [(list(range(len(targets))), partial(self.forward, batch))]

    @contextmanager
    def watch(self, seen: list[Any]) -> Iterator[None]:
        """Keep what the latest call of the model says of its tokens in ``seen[0]``: ids, mask, length of the cache."""

        def before(_: Any, args: tuple, kwargs: dict) -> None:
            ids = args[0] if args else kwargs.get("input_ids")
            mask, known = kwargs.get("attention_mask"), self._known
            start = cached(args, kwargs, None if known is None else known.shape[1])  # now: the layers will fill it
            seen[:] = [(ids, mask if isinstance(mask, Tensor) else None, start)]

        with self.model.register_forward_pre_hook(before, with_kwargs=True):
            yield

    @contextmanager
    def picking(self, target: Target) -> Iterator[Pick]:
        if not self._decodes(target.module):
            yield partial(self._pick_in_tower, target)
            return
        seen: list[Any] = []
        with self.watch(seen):
            yield partial(self._pick, target, seen, MeansSoFar())

    def _pick(self, target: Target, seen: list[Any], means: MeansSoFar, x: Tensor) -> Picked | PickedMeans | None:
        """Rows of the language model; calls without such rows (image tokens while decoding) pass by."""
        ids, attention, start = seen[0] if seen else (None, None, 0)
        if ids is None:
            raise InputError(f"{target} cannot be read: the model was called without input_ids.")
        known = self._known
        kinds, position = (t.to(x.device) for t in kinds_of(ids, attention, start, self.vocabulary, known))
        prompt = known.shape[1] if known is not None else 0 if ids.shape[1] == 1 else None
        tokens = to_tokens(x, target.layout)
        keep = select(target.tokens, kinds)
        packed = self._packed
        if packed is not None:
            segment, position = (packed[k].to(x.device) for k in (SEGMENTS, PLACES))
        if target.tokens in MEANS:
            if packed is not None:
                raise InputError(f"{target} is a mean over a conversation, and conversations are packed into blocks.")
            rows, has = means.add(tokens.float(), keep, start)
            item = has.nonzero()[:, 0]
            image = torch.full_like(item, target.tokens == "image_mean", dtype=torch.bool)
            picked = PickedMeans(tokens, Where(item, None, image, None, start, prompt), keep, rows[has])
        else:
            item = keep.nonzero()[:, 0] if packed is None else segment[keep]
            kinds, position = kinds[keep], position[keep]
            where = Where(item, position, kinds >= PATCH, flagged(kinds), start, prompt, role=kinds)
            picked = Picked(tokens, where, keep)
        return None if start and not len(item) else picked

    def _pick_in_tower(self, target: Target, x: Tensor) -> Picked:
        """Rows of the vision tower; only the class token is special.

        ``where.item`` is the row of the batch where every prompt with an image has one, else the image or tile.
        """
        tokens = to_tokens(x, target.layout)
        special = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=x.device)
        special[:, 0] = has_cls(self.model)
        keep = {"all": torch.ones_like(special), "patches": ~special, "cls": special}[target.tokens]
        item, position = keep.nonzero(as_tuple=True)
        if self._known is not None:
            is_image = self._known >= PATCH
            packed = self._packed
            owners = is_image.any(1).nonzero()[:, 0] if packed is None else packed[SEGMENTS][is_image].unique()
            item = owners.to(x.device)[item] if len(owners) == len(tokens) else item  # else several, or tiles
        return Picked(tokens, Where(item, position, torch.ones_like(item, dtype=torch.bool), special[keep]), keep)

    @property
    def objectives(self) -> dict[str, HostLoss]:
        """``lm``: cross-entropy of question and answer, which is 0 for what no predicted token comes after."""
        return {"lm": HostLoss("lm", lambda host, batch: host._text_loss(batch).ce)}

    @torch.no_grad()
    def loss(
        self,
        batch: ImageTextBatch,
        edits: Mapping[str, Callable] | Iterable[tuple[Site | str, Callable]] = (),
        targets: str = "text",
    ) -> TextLoss:
        """Cross-entropy of the text of a batch, given all before it.

        Args:
            batch: A batch of :attr:`collate`; with ``collator("question+answer")`` answers are predicted too.
            edits: ``(site, fn)`` pairs that hold meanwhile, e.g. an SAE's reconstruction, or zeros at ``[all]``.
            targets: Policy of the predicted tokens, ``text`` or ``text_all``.
        """
        with ExitStack() as stack:
            for site, fn in edits.items() if isinstance(edits, Mapping) else edits:
                stack.enter_context(self.edit(site, fn))
            return self._text_loss(batch, targets)

    def _text_loss(self, batch: ImageTextBatch, targets: str = "text") -> TextLoss:
        logits = self._forward(batch).logits
        ids, attention = (batch.inputs[k].to(logits.device) for k in ("input_ids", "attention_mask"))
        position = attention.long().cumsum(1) - 1
        keep = (select(targets, batch.inputs["kinds"].to(logits.device)) & (position > 0))[:, 1:]
        ce = nn.functional.cross_entropy(logits[:, :-1][keep].float(), ids[:, 1:][keep], reduction="none")
        return TextLoss(ce, keep.nonzero()[:, 0], position[:, 1:][keep])

    def grid(self, batch: ImageTextBatch) -> list[ImageGrid]:
        """Where the tokens of every image of a batch lie in the image, by the processor's own arithmetic."""
        inputs = {k: v.cpu() for k, v in batch.inputs.items()}
        return place(inputs["kinds"] >= PATCH, inputs["attention_mask"], layouts(self.processor, inputs))
