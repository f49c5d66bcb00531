"""Vision-language models of transformers (LLaVA, LLaVA-NeXT, Qwen-VL) as frozen hosts.

One sequence holds image and text tokens, so a site here is a module of the language model and a token policy
(:mod:`mmsae.hosts.lvlm.load`): ``layers.16:out[image]``, ``layers.16:out[text]``, ``layers.30:in[text_mean]``.
``layers.N`` is short for the model's own path. Modules of the vision tower are sites, too
(:mod:`mmsae.hosts.lvlm.tokens`). Batches come from :attr:`LVLMHost.collate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmsae.hosts.base import Host, Sites
from mmsae.hosts.capture import Rows
from mmsae.hosts.hooks import Port
from mmsae.hosts.lvlm.image_grid import ImageGrid, check_processor, layouts, place
from mmsae.hosts.lvlm.load import PATCH, POLICIES, Vocabulary, decoder_path, plain_config, select
from mmsae.hosts.lvlm.prompt import Collator, TextChoice
from mmsae.hosts.lvlm.tokens import read, resolve, tap
from mmsae.hosts.sites import _SPEC, Target, find_port
from mmsae.hosts.tokens import Marks
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError, Site, Tokens

_LOST = "of a vision-language model: image and text share one sequence; read a site like 'layers.2:out[image]'."


class TextLoss(NamedTuple):
    """Cross-entropy of next-token predictions.

    Attributes:
        ce: ``(N,)`` nats, one per predicted token.
        item: ``(N,)`` which item of the batch.
        position: ``(N,)`` position of the predicted token.
    """

    ce: Tensor
    item: Tensor
    position: Tensor


def recovered(original: float, reconstructed: float, zeroed: float) -> float:
    """Share of the cross-entropy that zeroed states lose which reconstructed ones keep: 1 is perfect."""
    return (zeroed - reconstructed) / (zeroed - original)


class LVLMHost(Host):
    """A frozen vision-language model.

    Args:
        model: ``...ForConditionalGeneration`` of transformers.
        processor: Its processor.
        hint: How to load it again.
        device: Where it runs; None where it is (models that a device map has spread).

    Attributes:
        vocabulary: Ids of image and special tokens.
        collate: ``collate(samples) -> ImageTextBatch``, see :class:`~mmsae.hosts.lvlm.prompt.Collator`; give it to
            ``Reader.of(..., collate=)``. :meth:`collator` makes others.
        decoder: Module path of the language model, ``model.language_model``.
    """

    modalities = (IMAGE, TEXT)

    def __init__(self, model: nn.Module, processor: Any, hint: str = "", device: str | torch.device | None = None):
        check_processor(processor, model, hint)
        self.processor, self._known = processor, None
        self.decoder = decoder_path(model)
        super().__init__(model, hint, model.device if device is None else device)
        image = getattr(model.config, "image_token_id", None)
        image = processor.image_token_id if image is None else image
        self.vocabulary = Vocabulary.of(processor.tokenizer, image, (image,))
        text = model.config.get_text_config()
        self.n_layers, self.hidden_size = text.num_hidden_layers, text.hidden_size
        self.context_length = min(text.max_position_embeddings, processor.tokenizer.model_max_length)
        self.collate = self.collator()

    def collator(self, text: TextChoice = "question", padding_side: str = "left") -> Collator:
        """What makes batches; holds no weights. ``text``: whether answers are part of the sequence."""
        return Collator(self.processor, self.vocabulary, self.context_length, text, padding_side)

    def reading(self, modalities: Collection[str], text: str = "question") -> dict[str, Any]:
        """As :meth:`Host.reading`: its own collate, which needs an image, and a question or caption."""
        return {"transform": None, "tokenize": None, "collate": self.collator(text)}

    def prompt(self, question: str, answer: str | None = None, images: int = 1) -> str:
        """The text of a prompt, by the processor's chat template where it has one."""
        return self.collate.prompt(question, answer, images)

    def config(self) -> dict[str, Any]:
        """The model's configuration without names of folders and versions."""
        return plain_config(self.model.config.to_dict())

    def _image_area(self) -> int:
        side = getattr(self.model.config.vision_config, "image_size", None)
        return side**2 if isinstance(side, int) else 224**2  # of any size, as it comes

    def to(self, device: str | torch.device) -> Host:
        """Move the host; one that a device map has spread stays where it is."""
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            return self
        return super().to(device)

    # Sites.

    @property
    def endpoints(self) -> tuple[str, ...]:
        """None: what an encoder would embed is a mean here, ``layers.N:in[image_mean]``."""
        return ()

    def site(self, spec: str | Site, allow_other_site: bool = False) -> Site:
        """As :meth:`Host.site`; without a policy, a spec means ``all`` tokens."""
        if isinstance(spec, Site):
            return self.check_site(spec, allow_other_site)
        t = self._resolve(spec)
        return Site(self.fingerprint, t.module, t.io, t.tokens, t.modality, t.layout.width, self.hint)

    def sites(self, spec: str) -> dict[str, Site]:
        """Both segments of a module: ``"layers.2:out"`` is ``{image: ...[image], text: ...[text]}``."""
        spec = spec.partition("[")[0]
        return {m: self.site(f"{spec}[{m}]") for m in self.modalities}

    def default_sites(self) -> dict[str, Site]:
        """Image and text tokens of the residual stream after half of the layers."""
        return self.sites(f"layers.{max(0, self.n_layers // 2 - 1)}:out")

    def width(self, spec: str | Site = "layers.0:in[all]") -> int:
        """Feature width d at a site."""
        return self.site(spec).width

    def _target(self, site: Site | str) -> Target:
        s = self.site(site)
        return self._resolve(f"{s.module}:{s.io}[{s.tokens}]")

    def _resolve(self, spec: str) -> Target:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InputError(f"site {spec!r} is not MODULE.PATH:io[tokens], as in layers.2:out[image].")
        module, io, tokens = match["module"], match["io"] or "out", match["tokens"] or "all"
        if io not in ("in", "out", "update"):
            raise InputError(f"site {spec!r}: io {io!r} is not one of in, out, update.")
        names = dict(self.model.named_modules())
        module = next((m for m in (module, f"{self.decoder}.{module}", f"model.{module}") if m in names), module)
        find_port(self, module, io)  # raises where there is none, with near matches
        if not f"{module}.".startswith(f"{self.decoder}."):
            return resolve(self, module, io, tokens)
        if tokens not in POLICIES:
            raise InputError(f"site {spec!r}: token policy {tokens!r} is not one of {', '.join(POLICIES)}.")
        return Target(module, io, tokens, POLICIES[tokens], self._layout(module, io, TEXT))

    # Running it.

    @contextmanager
    def _about(self, batch: ImageTextBatch) -> Iterator[dict[str, Tensor]]:
        """The model's arguments of a batch; what its tokens are is known while the context is open."""
        if batch.inputs is None:
            raise InputError(f"host {self.hint} needs batches of its own collate; this one has no processor inputs.")
        accepted, before = self._accepted, self._known
        self._known = batch.inputs.get("kinds")
        try:
            yield {
                k: v.to(self.device, self.model.dtype if v.is_floating_point() else None, non_blocking=True)
                for k, v in batch.inputs.items()
                if k in accepted
            }
        finally:
            self._known = before

    @property
    def _accepted(self) -> set[str]:
        import inspect

        return set(inspect.signature(self.model.forward).parameters)

    @torch.no_grad()
    def forward(self, batch: ImageTextBatch, **options: Any) -> Any:
        """The model's own output for a batch, without cache; ``logits`` are ``(B, L, V)``."""
        with self._about(batch) as inputs:
            if not hasattr(getattr(self.model, "model", None), "get_rope_index"):  # Qwen-VL finds positions itself
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

    def capture(self, batch: ImageTextBatch, sites: str | Sites | None = None) -> Tokens:
        """Image and text segments of a batch, as :meth:`Host.capture`.

        Args:
            batch: Of :attr:`collate`.
            sites: A module, whose ``image`` and ``text`` tokens are taken (``"layers.2:out"``), or one site per
                modality; default: :meth:`default_sites`. A segment may be empty (prompts without image).
        """
        if isinstance(sites, str):
            sites = self.sites(sites) if "[" not in sites else [sites]
        return super().capture(batch, self.default_sites() if sites is None else sites)

    def read(self, batch: ImageTextBatch, sites: Sequence[Site | str]) -> list[Rows]:
        """Rows at several sites, in their order, with one forward pass that stops when all are read."""
        return read(self, batch, [self._target(s) for s in sites])

    def edit(self, site: Site | str, fn: Callable[..., Tensor], *, where: bool = False) -> AbstractContextManager[None]:
        """As :meth:`Host.edit`; holds in prefill and in decoding with a cache.

        While one token at a time is decoded, text rows are the new tokens and image rows do not come again. A site of
        means shifts every averaged token by the change of the mean; decoding, the mean is that of all tokens so far
        and the new token is shifted by its change, while those in the cache keep the shift of their own step (beam
        search reorders the cache unseen: use means with one beam).

        Args:
            site: Where.
            fn: ``fn(rows)``; it must not change them in place. The same object changes nothing at all.
            where: Call ``fn(rows, where)`` with a :class:`~mmsae.hosts.sites.Where`.
        """
        return tap(self, self._target(site), lambda rows, at, span: fn(rows, at) if where else fn(rows))

    def loss(
        self,
        batch: ImageTextBatch,
        edits: Mapping[str, Callable] | Iterable[tuple[Site | str, Callable]] = (),
        targets: str = "text",
    ) -> TextLoss:
        """Cross-entropy of the text of a batch, given all before it.

        Args:
            batch: Of :attr:`collate`; with ``collator("question+answer")`` answers are predicted too.
            edits: ``(site, fn)`` pairs that hold meanwhile, e.g. an SAE's reconstruction, or zeros at ``[all]``.
            targets: Policy of the predicted tokens, ``text`` or ``text_all``.
        """
        with ExitStack() as stack:
            for site, fn in edits.items() if isinstance(edits, Mapping) else edits:
                stack.enter_context(self.edit(site, fn))
            logits = self.forward(batch).logits
        ids, attention = (batch.inputs[k].to(logits.device) for k in ("input_ids", "attention_mask"))
        position = attention.long().cumsum(1) - 1
        keep = (select(targets, batch.inputs["kinds"].to(logits.device)) & (position > 0))[:, 1:]
        ce = nn.functional.cross_entropy(logits[:, :-1][keep].float(), ids[:, 1:][keep], reduction="none")
        return TextLoss(ce, keep.nonzero()[:, 0], position[:, 1:][keep])

    def grid(self, batch: ImageTextBatch) -> list[ImageGrid]:
        """Where the tokens of every image of a batch lie in the picture, by the processor's own arithmetic."""
        inputs = {k: v.cpu() for k, v in batch.inputs.items()}
        return place(inputs["kinds"] >= PATCH, inputs["attention_mask"], layouts(self.processor, inputs))

    # What the base class asks of hosts with one encoder per modality.

    def transform(self, train: bool = False) -> Callable:
        """Refused: the processor sees image and text together."""
        raise InputError(f"host {self.hint} has no image transform of its own: use its collate.")

    def _encode(self, modality: str, x: Tensor) -> Tensor:
        return self.model(input_ids=x, use_cache=False).logits[:, -1]

    def _modality(self, module: str) -> str:
        return TEXT

    def _probe_input(self, modality: str, n: int) -> Tensor:
        words = [i for i in range(len(self.vocabulary.special) + 1) if i not in self.vocabulary.special]
        return torch.full((n, 3), words[0])

    def encode_image(self, images: Tensor) -> Tensor:
        """Refused."""
        raise InputError(f"encode_image {_LOST}")

    def encode_text(self, ids: Tensor) -> Tensor:
        """Refused."""
        raise InputError(f"encode_text {_LOST}")

    def _endpoint(self, name: str) -> Port:
        raise InputError(f"{name}: no endpoint {_LOST}")

    def _marks(self, modality: str, tokens: Tensor, ids: Tensor | None, is_map: bool) -> Marks:
        raise NotImplementedError("kinds take the place of marks")

    def _has_cls(self, modality: str) -> bool:
        return False
