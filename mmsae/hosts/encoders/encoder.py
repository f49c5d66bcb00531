"""Hosts with an image tower, a text tower or both, each of which ends in an embedding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.hosts.base import Host, Pick, Sites
from mmsae.hosts.capture import Picked, places
from mmsae.hosts.encoders.losses import CONTRASTIVE, LinearHead
from mmsae.hosts.encoders.pixels import Head, Resizer, Scale, split
from mmsae.hosts.gradient import Gradient, HostLoss
from mmsae.hosts.hooks import CallPort, Port, TensorEdit, autocast, watch_input
from mmsae.hosts.sites import Target, Where
from mmsae.hosts.tokenizer import HostTokenizer
from mmsae.hosts.tokens import Marks, check_policy, image_marks, keep_mask, last_word, text_marks, to_tokens
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError, Site, Tokens


class Encoder(Host):
    """A frozen host whose sites lie in two towers, or in one.

    Besides modules, the endpoints ``image.embed`` and ``image.pooled`` (and those of text) are sites: the embedding,
    and what it is projected from.

    A host of your own implements :meth:`config`, :meth:`transform`, :meth:`probe_input` and :meth:`encode` (and
    :attr:`tokenize` for texts); it overrides what else is not so on it, all of it under public names
    (docs/how-to/hosts.md).
    """

    #: ``tokenize(texts) -> (B, L)`` ids by the host's own tokenizer; None for hosts without text.
    tokenize: HostTokenizer | None = None
    context_length: int | None = None  #: L, or None.
    #: The factor of cosines in the host's logits (exponential of its parameter), or None.
    logit_scale: float | None = None
    #: What is added to them where the host was trained on pairs one by one (SigLIP), else None.
    logit_bias: float | None = None

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Names of the virtual endpoints."""
        return tuple(f"{m}.{e}" for m in self.modalities for e in ("embed", "pooled"))

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Those that are rows of embeddings."""
        return tuple(f"{m}.embed" for m in self.modalities)

    @abstractmethod
    def transform(self, train: bool = False) -> Callable:
        """The host's own transform, PIL image -> ``(3, H, W)``; ``train`` adds its augmentation, where it has one.

        Workers get a copy. One that ends in torchvision's ToTensor and Normalize is done in part on the device.
        """

    @abstractmethod
    def probe_input(self, modality: str, n: int) -> Tensor:
        """Any valid input of ``n`` items."""

    @abstractmethod
    def encode(self, modality: str, x: Tensor) -> Tensor:
        """``(B, d)`` un-normalised embeddings of what :meth:`transform` and :attr:`tokenize` make, in batches."""

    def endpoint(self, name: str) -> Port:
        """The port of a virtual endpoint; default: what :meth:`encode` returns, for ``pooled`` as well.

        An edit at the default holds for embeddings that are asked of the host, not for calls of ``self.model``: name
        the tensor there (a :class:`~mmsae.hosts.hooks.ModulePort`) where the model's own outputs are to follow.
        """
        return CallPort(self._encoded[name.partition(".")[0]])

    def tower(self, module: str) -> str:
        """Which tower a module belongs to; default: the first of :attr:`modalities`."""
        return self.modalities[0]

    def prefix(self, modality: str) -> tuple[int, int | None]:
        """How many class and register tokens are before the patches, and how many patches there are (None: unknown).

        The first of them is the class token. Default: none.
        """
        return 0, None

    def has_cls(self, modality: str) -> bool:
        """Whether a tower has a class token; default: what :meth:`prefix` says."""
        return self.prefix(modality)[0] > 0

    def marks(self, modality: str, tokens: Tensor, ids: Tensor | None, is_map: bool) -> Marks:
        """What the ``tokens (B, T, d)`` of a site are.

        Default: images by :meth:`prefix`; of texts, padding at the end and the tokenizer's special tokens, and
        ``eos`` is the last token before the padding.

        Args:
            modality: Whose they are.
            tokens: The site's tensor.
            ids: ``(B, L)`` token ids behind a text site.
            is_map: Whether the tokens are the cells of a map.
        """
        if modality == IMAGE:
            return image_marks(tokens, *((0, None) if is_map else self.prefix(modality)))
        if ids is None or ids.shape[1] != tokens.shape[1]:
            length = "no" if ids is None else ids.shape[1]
            raise InputError(f"a text site of host {self.hint} has {tokens.shape[1]} tokens for {length} token ids.")
        ids = ids.to(tokens.device)
        end = last_word(ids, self.tokenize.pad_id(), self.tokenize.eos_id())
        return text_marks(ids, end, end, self.tokenize.special_ids())

    def ids_entry(self) -> nn.Module | None:
        """The module whose first argument is the token ids; default: those are known that :meth:`encode` was given."""
        return None

    def reading(self, modalities: Collection[str], text: str = "question") -> dict[str, Any]:
        if text != "question":
            raise InputError(f"text is {text}, but host {self.hint} reads captions: it has no conversations")
        transform = None
        if IMAGE in modalities:
            transform = self.transform(train=False) if self._split is None else self._split[0]
        return {
            "transform": transform,
            "tokenize": self.tokenize if TEXT in modalities else None,
            "collate": None,
        }

    @cached_property
    def _split(self) -> tuple[Head, Scale] | None:
        """The transform's part for the workers and its part for the host's device; None where it is of one part."""
        return split(self.transform(train=False), self.device)

    @cached_property
    def _resizer(self) -> Resizer:
        return Resizer(self.transform(train=False), self.hint)

    def unsized(self) -> Head:
        """In place of the transform that :meth:`reading` gives: pixels as they are, resized on the host's device.

        The device's interpolation has other bits, see :class:`~mmsae.hosts.encoders.pixels.Agreement`.

        Raises:
            InputError: The host has no images, or its transform does what the device cannot.
        """
        if IMAGE not in self.modalities or self._split is None:
            raise InputError(f"resize is device, but host {self.hint} has no transform that ends in a scale of pixels")
        self._resizer  # noqa: B018  refuses
        return Head((), self._split[0].whole, ragged=True)

    def pixels(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """``(B, 3, H, W)`` floats on the host's device, of ``pixels`` and ``sizes`` of :meth:`unsized` images."""
        made = self._resizer(inputs["pixels"].to(self.device, non_blocking=True), inputs["sizes"])
        return self._split[1].to(self.device)(made)

    def prepared(self, batch: ImageTextBatch, device: str | torch.device | None = None) -> ImageTextBatch:
        if batch.inputs is not None and "sizes" in batch.inputs:
            return batch._replace(images=self.pixels(batch.inputs), inputs=None)
        if batch.images is None or batch.images.dtype != torch.uint8:
            return batch
        device = self.device if device is None else torch.device(device)
        return batch._replace(images=self._split[1].to(device)(batch.images.to(device, non_blocking=True)))

    def default_sites(self) -> dict[str, Site]:
        return {m: self.site(f"{m}.embed") for m in self.modalities}

    def image_area(self) -> int | None:
        return self.probe_input(IMAGE, 1).shape[-2:].numel() if IMAGE in self.modalities else None

    # Embeddings.

    @torch.no_grad()
    def _run(self, modality: str, x: Tensor) -> Tensor:
        return self.embed(modality, x)

    def embed(self, modality: str, x: Tensor) -> Tensor:
        """``(B, d)`` float32 raw embeddings, differentiable by what an open edit puts in."""
        if modality not in self.modalities:
            raise InputError(f"host {self.hint} has no {modality} encoder (it has {', '.join(self.modalities)}).")
        if modality == TEXT:
            self._ids[:] = [x]
        with autocast(self.device, self.precision):
            out = self.encode(modality, x.to(self.device, non_blocking=True)).float()
        for fn in tuple(self._encoded[modality]):
            out = fn(out)
        return out

    @cached_property
    def _encoded(self) -> dict[str, list[TensorEdit]]:
        """What is attached to the default endpoints."""
        return {m: [] for m in self.modalities}

    @cached_property
    def _ids(self) -> list[Tensor]:
        """The texts that are encoded, or were last."""
        return []

    def encode_image(self, images: Tensor) -> Tensor:
        """``(B, d)`` float32 raw (un-normalised) embeddings of ``images (B, 3, H, W)``."""
        return self._run(IMAGE, images)

    def encode_text(self, ids: Tensor) -> Tensor:
        """``(B, d)`` float32 raw (un-normalised) embeddings of token ids ``(B, L)``."""
        return self._run(TEXT, ids)

    @cached_property
    def classifier(self) -> tuple[Tensor, Tensor] | None:
        """``(C, d)`` weights and ``(C,)`` bias of the host's own linear classifier of ``image.embed``, or None."""
        return None

    @property
    def objectives(self) -> dict[str, HostLoss]:
        found = [CONTRASTIVE] if self.logit_scale is not None else []
        if self.classifier is not None:
            found.append(LinearHead(*self.classifier).objective())
        return {o.name: o for o in found}

    # Sites.

    def modality_of(self, module: str, tokens: str = "all") -> str:
        return module.partition(".")[0] if module in self.endpoints else self.tower(module)

    def check_policy(self, target: Target, where: str) -> None:
        check_policy(target.tokens, target.layout, target.modality, self.has_cls(target.modality), where)

    def port(self, module: str, io: str) -> Port:
        return self.endpoint(module) if module in self.endpoints else super().port(module, io)

    def probe(self, module: str, n: int) -> None:
        modality = self.modality_of(module)
        self._run(modality, self.probe_input(modality, n))

    @contextmanager
    def picking(self, target: Target) -> Iterator[Pick]:
        layout, entry = target.layout, self.ids_entry()
        ids: list[Tensor] = self._ids if entry is None else []

        def pick(x: Tensor) -> Picked:
            tokens = to_tokens(x, layout)
            if not target.has_tokens:
                return Picked(tokens, Where(torch.arange(len(tokens), device=x.device)))
            marks = self.marks(target.modality, tokens, ids[0] if ids else None, layout.ndim == 4)
            keep = None if target.tokens == "all" else keep_mask(target.tokens, marks)
            if target.pooled:
                return Picked(tokens, Where(torch.arange(len(tokens), device=x.device)), keep, pooled=True)
            grid = tuple(x.movedim((layout.batch, layout.channel), (0, -1)).shape[1:3]) if layout.ndim == 4 else None
            special = marks.special.flatten() if keep is None else marks.special[keep]
            return Picked(tokens, Where(*places(tokens, keep), special=special, grid=grid), keep)

        with ExitStack() as stack:
            if target.has_tokens and target.modality == TEXT and entry is not None:
                stack.enter_context(watch_input(entry, ids))
            yield pick

    def passes(self, batch: ImageTextBatch, targets: Sequence[Target]) -> list[tuple[list[int], Callable[[], Any]]]:
        found = []
        for m in dict.fromkeys(t.modality for t in targets):
            x = batch.images if m == IMAGE else batch.texts
            if x is None:
                raise InputError(f"a site reads the {m}s of a batch that has none.")
            found.append(([i for i, t in enumerate(targets) if t.modality == m], partial(self._run, m, x)))
        return found

    def capture(self, batch: ImageTextBatch, sites: Sites | None = None, gradient: Gradient = "") -> Tokens:
        """Activations of a batch (:meth:`Host.capture`); default: the ``embed`` endpoints of what the batch holds."""
        if sites is None:
            held = {IMAGE: batch.images, TEXT: batch.texts}
            sites = [f"{m}.embed" for m in self.modalities if held[m] is not None]
        return super().capture(batch, sites, gradient)


def as_encoder(host: Host, task: str) -> Encoder:
    """The host, which has to have embeddings, as vision-language models and makers of images have not.

    Args:
        host: Any host.
        task: What needs them, for the message.
    """
    if not isinstance(host, Encoder):
        raise InputError(
            f"{task} needs embeddings of images or texts, and host {host.hint} ({type(host).__name__}) has none: name "
            "a host of open_clip, timm or transformers"
        )
    return host
