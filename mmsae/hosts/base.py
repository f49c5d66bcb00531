"""A frozen host: reads activations at a :class:`~mmsae.types.Site` and lets a function replace them there.

Site specs are ``image.embed``, ``text.pooled`` (virtual endpoints) or ``MODULE.PATH:io[tokens]`` in the host's own
naming, e.g. ``visual.transformer.resblocks.5:out[patches]``; ``io`` defaults to ``out``, ``tokens`` to ``all`` for
token states and ``pooled`` elsewhere. What a module's tensor looks like is found by running it on a batch of one and a
batch of two, so any module of any host can be a site as long as its tensor holds one feature vector per token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.fingerprint import fingerprint
from mmsae.hosts.capture import Rows, read, tap
from mmsae.hosts.hooks import Port, autocast
from mmsae.hosts.sites import Target, probe, resolve
from mmsae.hosts.tokenizer import HostTokenizer
from mmsae.hosts.tokens import Layout, Marks
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError, Site, Tokens

Sites = Mapping[str, Site | str] | Sequence[Site | str]


def check_device(device: str | torch.device) -> None:
    """Refuse what names no device, and a CUDA device where there is none."""
    try:
        kind = torch.device(device).type
    except RuntimeError as e:
        raise InputError(f"device {str(device)!r} is not known to torch; there are cpu and cuda, as cuda:0.") from e
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {str(device)!r} was asked for, but torch sees no CUDA device.")


def pick_device(device: str, rank: int = 0) -> str:
    """Where to compute: ``auto`` and ``cuda`` become this rank's GPU, or ``auto`` the CPU where there is none.

    Raises:
        InputError: No such device.
    """
    found = torch.cuda.is_available()
    device = ("cuda" if found else "cpu") if device == "auto" else device
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device is {device!r}; it must be cpu, cuda or auto")
    if device.startswith("cuda") and not found:
        raise InputError(f"device is {device}, and torch finds no such GPU here; there is cpu")
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device


class Host(ABC):
    """A frozen host in eval mode.

    Args:
        model: The host; parameters are frozen here.
        hint: How to load it again.
        device: Where it runs.
        precision: ``fp32``, or autocast ``bf16`` / ``fp16``; outputs are float32 either way.

    Attributes:
        modalities: What it encodes.
        tokenize: ``tokenize(texts) -> (B, L)`` ids by the host's own tokenizer; None for hosts without text.
        context_length: L, or None.
        logit_scale: The factor of cosines in the host's logits (exponential of its parameter), or None.
    """

    modalities: tuple[str, ...] = (IMAGE,)
    tokenize: HostTokenizer | None = None
    context_length: int | None = None
    logit_scale: float | None = None

    def __init__(self, model: nn.Module, hint: str = "", device: str | torch.device = "cpu", precision: str = "fp32"):
        if precision not in ("fp32", "bf16", "fp16"):
            raise InputError(f"precision {precision!r} is not one of fp32, bf16, fp16.")
        self.model = model.eval().requires_grad_(False)
        self.hint, self.precision = hint, precision
        self._layouts: dict[tuple[str, str], Layout] = {}
        self._probing = False
        self.to(device)

    # What a host says about itself.

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values that, with the weights, determine the outputs."""

    @abstractmethod
    def transform(self, train: bool = False) -> Callable:
        """The host's own transform, PIL image -> ``(3, H, W)``; ``train`` adds its augmentation."""

    def reading(self, modalities: Collection[str], text: str = "question") -> dict[str, Any]:
        """``transform``, ``tokenize`` and ``collate`` for the pipelines of ``mmsae.shards``: what makes its batches.

        Args:
            modalities: That are read.
            text: ``question+answer`` asks for whole conversations, which only vision-language hosts have.

        Raises:
            InputError: This host has none.
        """
        if text != "question":
            raise InputError(f"text is {text}, but host {self.hint} reads captions: it has no conversations")
        return {
            "transform": self.transform(train=False) if IMAGE in modalities else None,
            "tokenize": self.tokenize if TEXT in modalities else None,
            "collate": None,
        }

    @abstractmethod
    def _encode(self, modality: str, x: Tensor) -> Tensor:
        """``(B, d)`` un-normalised embeddings."""

    @abstractmethod
    def _endpoint(self, name: str) -> Port:
        """The port of a virtual endpoint."""

    @abstractmethod
    def _marks(self, modality: str, tokens: Tensor, ids: Tensor | None, is_map: bool) -> Marks:
        """What the ``tokens (B, T, d)`` of a site are; ``ids (B, L)`` are the token ids behind a text site."""

    @abstractmethod
    def _has_cls(self, modality: str) -> bool:
        """Whether an encoder has a class token."""

    @abstractmethod
    def _probe_input(self, modality: str, n: int) -> Tensor:
        """Any valid input of ``n`` items."""

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Names of the virtual endpoints."""
        return tuple(f"{m}.{e}" for m in self.modalities for e in ("embed", "pooled"))

    def _modality(self, module: str) -> str:
        """Which encoder a module belongs to."""
        return IMAGE

    def _ids_entry(self) -> nn.Module | None:
        """The module whose first argument is the token ids."""
        return None

    def _channels_last(self) -> bool:
        """Whether the host's maps are ``(B, H, W, d)``."""
        return False

    # Running it.

    @property
    def device(self) -> torch.device:
        """Where the host is."""
        return next(self.model.parameters()).device

    def batch_size(self, asked: int | None = None) -> int:
        """Samples of a forward pass: what is asked for, else 256; on a CPU fewer where images are large.

        There as many as have the area of 16 images of 224 pixels, a power of two from 4 to 256: activations that do not
        stay in the caches cost twice the CPU time, in page faults.

        Raises:
            InputError: Fewer than one is asked for.
        """
        if asked is not None and asked < 1:
            raise InputError(f"batch_size is {asked}; it must be at least 1")
        if asked is not None:
            return asked
        if self.device.type != "cpu" or (pixels := self._image_area()) is None:
            return 256
        return min(256, max(4, 2 ** int(math.log2(16 * 224**2 / pixels))))

    def _image_area(self) -> int | None:
        """Pixels of an image as the host takes it; None for hosts of text."""
        return self._probe_input(IMAGE, 1).shape[-2:].numel() if IMAGE in self.modalities else None

    def to(self, device: str | torch.device) -> Host:
        """Move the host; the fingerprint does not change."""
        check_device(device)
        self.model.to(device)
        return self

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of config and weights, taken once: the host is frozen."""
        return fingerprint(self.config(), self.model.state_dict())

    @torch.no_grad()
    def _run(self, modality: str, x: Tensor) -> Tensor:
        if modality not in self.modalities:
            raise InputError(f"host {self.hint} has no {modality} encoder (it has {', '.join(self.modalities)}).")
        with autocast(self.device, self.precision):
            return self._encode(modality, x.to(self.device, non_blocking=True)).float()

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

    # Sites.

    def _layout(self, module: str, io: str, modality: str) -> Layout:
        """What a site's tensor looks like, probed once; edits that are open do not see the probe."""
        if (module, io) not in self._layouts:
            self._probing = True
            try:
                self._layouts[module, io] = probe(self, module, io, modality)
            finally:
                self._probing = False
        return self._layouts[module, io]

    def site(self, spec: str | Site, allow_other_site: bool = False) -> Site:
        """The site that a spec names on this host; a :class:`Site` is checked and returned as one of this host.

        Raises:
            InputError: Unknown module or policy, or (see :meth:`check_site`) a site of another host.
        """
        if isinstance(spec, Site):
            return self.check_site(spec, allow_other_site)
        t = resolve(self, spec)
        return Site(self.fingerprint, t.module, t.io, t.tokens, t.modality, t.layout.width, self.hint)

    def check_site(self, site: Site, allow_other_site: bool = False) -> Site:
        """Refuse a site of another host.

        Args:
            site: From a checkpoint or a store; one without a host (imported checkpoints) is given this one.
            allow_other_site: Accept another fingerprint, not another width or modality.

        Returns:
            The same site as a site of this host.

        Raises:
            InputError: With both fingerprints, or the two widths or modalities that disagree.
        """
        if site.host and site.host != self.fingerprint and not allow_other_site:
            raise InputError(
                f"site {site.module} belongs to host {site.host} ({site.hint or 'no hint'}), but this host is "
                f"{self.fingerprint} ({self.hint or 'no hint'}); pass allow_other_site=True to attach anyway."
            )
        own = self.site(f"{site.module}:{site.io}[{site.tokens}]")
        for field in ("modality", "width"):
            theirs, ours = getattr(site, field), getattr(own, field)
            if theirs and theirs != ours:
                raise InputError(f"site {site.module} has {field} {theirs}, but on host {self.hint} it is {ours}.")
        return own

    def default_sites(self) -> dict[str, Site]:
        """``{modality: its embed endpoint}``."""
        return {m: self.site(f"{m}.embed") for m in self.modalities}

    def width(self, spec: str | Site = "image.embed") -> int:
        """Feature width d at a site."""
        return self.site(spec).width

    # Reading and replacing.

    def edit(self, site: Site | str, fn: Callable[..., Tensor], *, where: bool = False) -> AbstractContextManager[None]:
        """Context manager: while it is open, the host computes with ``fn(x)`` in place of ``x`` at ``site``.

        Holds for :meth:`encode_image`, :meth:`encode_text`, :meth:`capture` and direct calls of ``self.model``.

        Args:
            site: Where.
            fn: ``(N, d)`` float32 rows, in the order in which :meth:`capture` returns them, to rows of the same
                shape. It must not change its argument in place. Returning the same object changes nothing at all.
            where: Call ``fn(rows, where)`` with a :class:`~mmsae.hosts.sites.Where`.
        """
        return tap(self, self._target(site), lambda rows, at: fn(rows, at) if where else fn(rows))

    def _target(self, site: Site | str) -> Target:
        s = self.site(site)
        return resolve(self, f"{s.module}:{s.io}[{s.tokens}]")

    def read(self, batch: ImageTextBatch, sites: Sequence[Site | str]) -> list[Rows]:
        """Rows at several sites, in their order, with one forward pass per modality that stops when all are read.

        Raises:
            InputError: A site's modality is missing from the batch.
        """
        return read(self, batch, [self._target(s) for s in sites])

    def capture(self, batch: ImageTextBatch, sites: Sites | None = None) -> Tokens:
        """Activations of a batch, without gradients, on the host's device.

        Args:
            batch: Images and/or token ids.
            sites: One site per modality; default: the ``embed`` endpoints of what the batch holds.

        Returns:
            Tokens; ``position`` and ``special`` are filled for token sites.
        """
        if sites is None:
            held = {IMAGE: batch.images, TEXT: batch.texts}
            sites = [f"{m}.embed" for m in self.modalities if held[m] is not None]
        chosen = [self.site(s) for s in (sites.values() if isinstance(sites, Mapping) else sites)]
        names = [s.modality for s in chosen]
        if len(set(names)) != len(names):
            raise InputError(f"capture takes one site per modality, got {', '.join(names)}; use read for several.")
        rows = dict(zip(names, self.read(batch, chosen), strict=True))
        optional = {
            field: {m: getattr(r, field) for m, r in rows.items() if getattr(r, field) is not None} or None
            for field in ("position", "special")
        }
        return Tokens(
            {m: r.x for m, r in rows.items()}, {m: r.item for m, r in rows.items()}, batch.uids,
            faults=batch.faults, **optional,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hint!r}, {'+'.join(self.modalities)}, {self.device}, {self.precision})"
