"""Concept-level decoding against hallucination, inside Hugging Face's own ``generate`` (VL-SAE, section 8 of its spec).

At every step the model runs twice: once as it is, and once with the text states moved towards what the image's concepts
say. The two logits are mixed, and only tokens that the clean pass finds plausible remain. The second pass repeats the
very call that ``generate`` made, with a cache of its own, so sampling, stopping and processors stay those of
transformers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mmsae.fingerprint import fingerprint
from mmsae.hosts.lvlm.cache import caches, length
from mmsae.hosts.lvlm.host import LVLMHost
from mmsae.hosts.sites import Where
from mmsae.lvlm.decoding.settings import PRESETS, Settings
from mmsae.sae import SAE
from mmsae.sae.aligner import Aligner
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError

_PIECES = (
    "concept-level decoding needs the prompt in one call and without a cache that was filled before; "
    "leave prefill_chunk_size and the cache out"
)


def mix_logits(clean: Tensor, steered: Tensor | None, alpha_c: float, beta_c: float) -> Tensor:
    """``(1 - alpha_c) clean + alpha_c steered``, -inf where the clean logit is below ``max + ln(beta_c)``.

    Args:
        clean: ``(B, V)`` logits of the clean pass, which alone decide what is plausible.
        steered: ``(B, V)`` of the other pass; None for ``alpha_c`` 0.
        alpha_c: Share of the steered pass.
        beta_c: Plausibility; up to 1 the clean pass's best token always remains.

    Returns:
        ``(B, V)``; rows of which nothing remains are the clean ones.
    """
    out = clean == -math.inf  # what an earlier processor has excluded
    mixed = clean if steered is None or not alpha_c else (1 - alpha_c) * clean + alpha_c * steered
    mixed = mixed.masked_fill(out, -math.inf)
    if beta_c > 0:
        cut = clean.amax(-1, keepdim=True) + math.log(beta_c)
        mixed = mixed.masked_fill(clean < cut, -math.inf)
    return torch.where((mixed == -math.inf).all(-1, keepdim=True), clean, mixed)


def aligned_host(host: str, aligner: Aligner) -> str:
    """Fingerprint of a host with an aligner after it: an SAE on aligned states does not fit the host alone."""
    return blake2b(f"{host}\0{fingerprint({}, aligner.state_dict())}".encode(), digest_size=16).hexdigest()


class ConceptShift:
    """The map from the mean image state and the mean text state to where the mean text state should be.

    Args:
        sae: An SAE of image and text (VL-SAE: one encoder, two decoders), on aligned states if there is an aligner.
        aligner: What brings the states to the SAE's space and back; None: they are the SAE's own.
        alpha_m: See :class:`Settings`.
        beta_m: See :class:`Settings`.
    """

    def __init__(self, sae: SAE, aligner: Aligner | None, alpha_m: float, beta_m: float):
        self.sae, self.aligner, self.alpha_m, self.beta_m = sae, aligner, alpha_m, beta_m

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        """``(B, d)`` shift of the text states, for means ``(B, d)`` of both."""
        if not self.alpha_m:
            return torch.zeros_like(text)
        e = {IMAGE: image.float(), TEXT: text.float()}
        if self.aligner is not None:
            e = {m: self.aligner.align(x, m) for m, x in e.items()}
        codes = {m: self.sae.encode(x, m) for m, x in e.items()}
        # decoding is affine, so the mix of the two codes need not be made
        own = self.sae.decode(codes[TEXT], TEXT)
        seen = self.sae.decode(codes[IMAGE]._replace(info=codes[TEXT].info), TEXT)
        made = (1 - self.beta_m) * own + self.beta_m * seen
        if self.aligner is not None:
            made = self.aligner.unalign(made, TEXT)
        return self.alpha_m * (made.to(text) - text)


class WriteBack:
    """Moves all text tokens after the image by one shift per item; the mean over them is kept up while decoding.

    With a cache, tokens that are in it keep the shift of their own step; without one, all move by the latest. ``shift``
    takes means of image and text, both ``(B, d)``.
    """

    def __init__(self, shift: Callable[[Tensor, Tensor], Tensor]):
        self.shift = shift
        self.image: Tensor | None = None
        self.total: Tensor | None = None
        self.count: Tensor | None = None
        self.n_image: Tensor | None = None

    def __call__(self, rows: Tensor, where: Where) -> Tensor:
        """Edit of all tokens ``rows (N, d)`` of a call; image rows and those before the image stay as they are."""
        if where.prefill():
            if where.start:
                raise InputError(_PIECES)
            n = int(where.item.max()) + 1
            n_image = rows.new_zeros(n).index_add_(0, where.item, where.image.to(rows))
            image = rows.new_zeros(n, rows.shape[1]).index_add_(0, where.item[where.image], rows[where.image])
            self.image = image / n_image.clamp(min=1)[:, None]
            last = torch.full_like(where.item[:n], -1).scatter_reduce_(
                0, where.item, torch.where(where.image, where.position, -1), "amax"
            )
            after = ~where.image & (where.position > last[where.item]) & (n_image[where.item] > 0)
            self.total, self.count = torch.zeros_like(image), rows.new_zeros(n)
            self.n_image = n_image
        elif self.n_image is None:
            raise InputError(_PIECES)
        else:
            after = self.n_image[where.item] > 0
        item = where.item[after]
        self.total = self.total.index_add(0, item, rows[after])
        self.count = self.count.index_add(0, item, torch.ones_like(rows[after, 0]))
        moved = self.shift(self.image, self.total / self.count.clamp(min=1)[:, None])
        return (
            rows if not len(item) or not moved.any() else rows.index_add(0, after.nonzero()[:, 0], moved[item].to(rows))
        )


_OWN = object()  # where a call had a cache


class _Mixer(LogitsProcessor):
    """Runs the second pass and mixes; made by :meth:`ConceptDecoder.processor`."""

    def __init__(self, decoder: ConceptDecoder):
        self.decoder = decoder
        self.calls: list[dict[str, Any]] = []
        self.cache: Any = None
        self.edit = WriteBack(decoder.shift)
        self.busy = False

    def watch(self, _: Any, args: tuple, kwargs: dict) -> None:
        """Remember a call of the clean pass, before its cache is filled."""
        if self.busy:
            return
        call = {**({"input_ids": args[0]} if args else {}), **kwargs}
        for place, cache in caches((), call):
            if not length(cache):
                self.cache = copy.deepcopy(cache)
            elif self.cache is None:
                raise InputError(_PIECES)
            call[place] = _OWN
        self.calls.append(call)

    def steered(self) -> Tensor:
        """``(B, V)`` logits of the second pass over what was called since the last step."""
        self.busy, calls, self.calls = True, self.calls, []
        try:
            with self.decoder.host.edit(self.decoder.site, self.edit, where=True):
                for call in calls:
                    own = {k: self.cache if v is _OWN else v for k, v in call.items()}
                    out = self.decoder.host.model(**own)
                    self.cache = next((c for _, c in caches((), out)), self.cache)
        finally:
            self.busy = False
        return out.logits[:, -1].float()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mixed scores of one step."""
        s = self.decoder.settings
        return mix_logits(scores, self.steered().to(scores) if s.alpha_c else None, s.alpha_c, s.beta_c)


class ConceptDecoder:
    """Generation with concept-level decoding.

    Args:
        host: The host.
        sae: See :class:`ConceptShift`.
        aligner: See :class:`ConceptShift`.
        settings: Strengths; ``PRESETS`` has the published ones.
        site: Module and io whose text states are moved (``layers.30:out``); default: where the SAE's text states were
            read.
        allow_other_site: Accept another module or io than the SAE's: the published code trains at the input of a
            block and decodes at its output.

    Raises:
        InputError: No site, a site other than the SAE's, or widths that do not go together.
    """

    def __init__(
        self,
        host: LVLMHost,
        sae: SAE,
        aligner: Aligner | None = None,
        settings: Settings = PRESETS["pope"],
        site: str | None = None,
        allow_other_site: bool = False,
    ):
        self.host, self.settings = host, settings
        trained = sae.sites.get(TEXT)
        if trained is None and site is None:
            raise InputError("the SAE does not say where its states were read: give a site like layers.30:out")
        named = (site or f"{trained.module}:{trained.io}").partition("[")[0]
        self.site = host.site(f"{named}[all]")
        if trained is not None and not allow_other_site:
            if aligner is not None and trained.host == aligned_host(host.fingerprint, aligner):
                trained = replace(trained, host=host.fingerprint, width=0)
            host.check_site(trained).refuse_other(self.site)
        width = (aligner or sae).d_in[TEXT]
        if width != self.site.width:
            raise InputError(f"site {self.site} has width {self.site.width}, the text states' maps take {width}")
        if aligner is not None and aligner.width != sae.d_in[TEXT]:
            raise InputError(f"the aligner gives width {aligner.width}, the SAE takes {sae.d_in[TEXT]}")
        self.shift = ConceptShift(sae, aligner, settings.alpha_m, settings.beta_m)

    @contextmanager
    def processor(self) -> Iterator[LogitsProcessorList]:
        """What to give to one ``generate`` call as ``logits_processor`` while the context is open."""
        mixer = _Mixer(self)
        watched = nullcontext()
        if self.settings.alpha_c:
            watched = self.host.model.register_forward_pre_hook(mixer.watch, with_kwargs=True)
        with watched:
            yield LogitsProcessorList([mixer])

    @torch.no_grad()
    def generate(self, batch: ImageTextBatch, **options: Any) -> Any:
        """The host's ``generate`` with concept-level decoding; ``options`` go before those of the settings.

        Raises:
            InputError: Beam search, which reorders a cache that it does not know.
        """
        if options.get("num_beams", 1) != 1:
            raise InputError(
                f"concept-level decoding samples or takes the best token; num_beams is {options['num_beams']}"
            )
        with self.processor() as mine:
            given = options.pop("logits_processor", None) or []
            options = {**self.settings.generation(), **options}
            return self.host.generate(batch, **options, logits_processor=LogitsProcessorList([*mine, *given]))

    def answer(self, batch: ImageTextBatch, **options: Any) -> list[str]:
        """What the model says to each prompt, decoded."""
        ids = self.generate(batch, **options)
        ids = getattr(ids, "sequences", ids)[:, batch.inputs["input_ids"].shape[1] :]
        return [s.strip() for s in self.host.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]
