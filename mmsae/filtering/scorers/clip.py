"""What scores samples for filtering: the protocol, and the scorer of image-text pairs under a CLIP-like host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmsae.filtering.pair_weights import PairWeights
from mmsae.hosts import as_encoder, load_host, named_host, pick_device
from mmsae.kernels.pairs import code_norm
from mmsae.metrics.pairs.sample_scores import SCORES as LVLM_SCORES
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.types import IMAGE, TEXT, Codes, ImageTextBatch, InputError

ALWAYS = ("clip", "clip_centred", "pair_code", "pair_weighted")
PAIR_SCORES = (*ALWAYS, "pair_calibrated", "random")
SCORES = (*PAIR_SCORES, *LVLM_SCORES)
REASONS = 5  # concepts named per sample and side


class Only(NamedTuple):
    """Concepts that one side of each sample has and the other lacks, strongest first.

    Attributes:
        latents: ``(B, n)`` int64.
        strengths: ``(B, n)``; 0 where there are fewer than n.
    """

    latents: Tensor
    strengths: Tensor


class Evidence(NamedTuple):
    """Why samples score as they do.

    Attributes:
        text_only: What the text has and the image lacks.
        image_only: The reverse.
        counts: ``{column: (B,)}`` counts to tabulate beside the scores, ``l0_image`` and ``l0_text`` say.
        codes: ``{modality: codes, one row a sample}``, for choosing sets.
    """

    text_only: Only
    image_only: Only
    counts: dict[str, Tensor]
    codes: dict[str, Codes]


class Scorer(Protocol):
    """What filtering needs of a score.

    Attributes:
        name: The score to keep by: one of ``columns``, or ``random``, which is nobody's.
        columns: All scores that it tabulates.
        transform: Image to tensor, in the decoding workers; the host's own.
        tokenize: Captions to ids, there too.
        collate: Samples to a batch, in place of both, where the host sees image and text together.
        fingerprints: ``{"sae": ..., "host": ...}``, hashes of what scores.
        device: Kind of device, ``cpu`` or ``cuda``.
    """

    name: str
    columns: tuple[str, ...]
    transform: Callable | None
    tokenize: Callable | None
    collate: Callable | None
    fingerprints: dict[str, str]
    device: str

    def score(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """``{column: (B,)}``; a sample with a score that is not finite is dropped and counted."""

    def evidence(self, batch: ImageTextBatch) -> Evidence:
        """Why, for the same batch (a scorer may keep what it computed for it last)."""


class ScorerSpec(NamedTuple):
    """How to make a scorer; plain values, so that it travels to other processes.

    Attributes:
        sae: SAE folder or hub id.
        host: Name of the host; empty: the reload hint in the SAE's sites.
        score: Name of the score to keep by.
        weights: File of fitted weights; empty while they are being fitted.
        device: ``cpu``, ``cuda`` or ``auto``.
        precision: ``fp32`` or ``bf16``.
        seed: Of the score ``random``.
        other_site: Whether an SAE of another host is accepted.
        text: Under a vision-language LLM: ``question``, or ``question+answer``.
    """

    sae: str
    host: str
    score: str
    weights: str
    device: str
    precision: str
    seed: int
    other_site: bool
    text: str = "question"


class Pairs(NamedTuple):
    """B pairs as the host and the SAE see them.

    Attributes:
        x: ``{modality: (B, d)}`` embeddings in the host's joint space.
        codes: ``{modality: codes}``.
    """

    x: dict[str, Tensor]
    codes: dict[str, Codes]


class PairReader:
    """A CLIP-like host and an SAE on it: batches to embeddings and codes.

    Raises:
        InputError: The SAE belongs to another host, has one modality only, or gives several rows a sample.
    """

    def __init__(self, spec: ScorerSpec, rank: int = 0) -> None:
        device = pick_device(spec.device, rank)
        self.sae = SAE.from_pretrained(spec.sae, device).eval()
        self.host = load_host(named_host(spec.host, self.sae.sites, f"SAE {spec.sae}"), device, spec.precision)
        as_encoder(self.host, "a pair score")
        for have, what in ((self.sae.modalities, f"SAE {spec.sae}"), (self.host.modalities, f"host {self.host.hint}")):
            if not {IMAGE, TEXT} <= set(have):
                raise InputError(f"{what} has {' and '.join(have)}; pair scores need image and text")
        self.sites = {s.modality: s for s in self.sae.attach(self.host, spec.other_site)}
        if spec.other_site:
            self.sites = {m: self.host.site(s, allow_other_site=True) for m, s in self.sites.items()}
        self.embeds = {m: self.host.site(f"{m}.embed") for m in (IMAGE, TEXT)}
        self.transform, self.tokenize, self.collate = self.host.transform(train=False), self.host.tokenize, None
        self.device = torch.device(device).type
        self.fingerprints = {"sae": sae_fingerprint(self.sae), "host": self.host.fingerprint}

    @torch.no_grad()
    def read(self, batch: ImageTextBatch) -> Pairs:
        """Embeddings and codes of a batch, from one forward pass of each encoder."""
        wanted = list(dict.fromkeys([*self.sites.values(), *self.embeds.values()]))
        rows = dict(zip(wanted, (r.x for r in self.host.read(batch, wanted)), strict=True))
        for site in self.sites.values():
            if len(rows[site]) != len(batch.uids):
                raise InputError(f"{site} gives {len(rows[site])} rows for {len(batch.uids)} samples; a pair needs one")
        codes = {m: self.sae.encode(rows[self.sites[m]], m) for m in (IMAGE, TEXT)}
        return Pairs({m: rows[self.embeds[m]] for m in (IMAGE, TEXT)}, codes)


class ClipScorer:
    """Scores pairs under a CLIP-like host; a :class:`Scorer`."""

    def __init__(self, spec: ScorerSpec, rank: int = 0, reader: PairReader | None = None) -> None:
        self.reader = reader or PairReader(spec, rank)
        self.weights = PairWeights.load(spec.weights).to(self.reader.host.device)
        self.name = spec.score
        calibrated = ("pair_calibrated",) * (self.weights.calibrator is not None)
        self.columns = (*ALWAYS, *calibrated)
        self.transform, self.tokenize, self.collate = self.reader.transform, self.reader.tokenize, None
        self.fingerprints, self.device = self.reader.fingerprints, self.reader.device
        self._last: tuple[ImageTextBatch, Pairs] | None = None

    def _read(self, batch: ImageTextBatch) -> Pairs:
        if self._last is None or self._last[0] is not batch:
            self._last = batch, self.reader.read(batch)
        return self._last[1]

    @torch.no_grad()
    def score(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """See :class:`Scorer`."""
        x, codes = self._read(batch)
        scorer = self.weights.scorer
        out = scorer.embeddings(x[IMAGE], x[TEXT]) | scorer.codes(codes[IMAGE], codes[TEXT])
        if self.weights.calibrator is not None:
            out["pair_calibrated"] = self.weights.calibrator(codes[IMAGE], codes[TEXT], out)
        return out

    @torch.no_grad()
    def evidence(self, batch: ImageTextBatch) -> Evidence:
        """See :class:`Scorer`."""
        codes = self._read(batch).codes
        return Evidence(
            only(codes[TEXT], codes[IMAGE], self.weights.scorer.weights),
            only(codes[IMAGE], codes[TEXT], self.weights.scorer.weights),
            {f"l0_{m}": codes[m].l0() for m in (IMAGE, TEXT)},
            codes,
        )


def only(has: Codes, lacks: Codes, weights: Tensor, n: int = REASONS) -> Only:
    """Latents that fired on one side and not on the other.

    Their strength is the share in the norm of that side's code times the cross-modal weight: a latent that fires in one
    modality only, whatever the pair, has weight 0 and is no reason.

    Args:
        has: Codes of B rows.
        lacks: Codes of their partners.
        weights: ``(d_sae,)`` in [0, 1].
        n: Latents per row.
    """
    if has.indices is None or lacks.indices is None:
        ids = torch.arange(has.d_sae, device=has.values.device).expand(has.n, -1)
        value, other = has.to_dense(), lacks.to_dense()
    else:
        ids, value = has.indices, has.values
        fired = torch.where(lacks.values != 0, lacks.indices, -1)
        other = (ids[:, :, None] == fired[:, None, :]).any(2)
    strength = value.clamp(min=0) * weights[ids] / code_norm(has).clamp(min=1e-12)[:, None]
    strength = torch.where(other != 0, 0, strength)
    strength, order = strength.sort(stable=True, dim=1, descending=True)
    return Only(ids.gather(1, order)[:, :n], strength[:, :n])


def is_clip(host: str) -> bool:
    """Whether a host's name says that it is CLIP-like: everything but hub ids and folders of other libraries."""
    kind, _, rest = host.partition(":")
    if kind == "local-dir":
        return (Path(rest) / "open_clip_config.json").is_file()
    return kind not in ("hf-hub", "lvlm")


def check_score(score: str, host: str) -> None:
    """Refuse a score that does not exist, or not for this kind of host.

    Raises:
        InputError: One sentence.
    """
    if score not in SCORES:
        raise InputError(f"no score {score!r}; there are {', '.join(SCORES)}")
    if host.startswith("lvlm:") and score in PAIR_SCORES[:-1]:
        raise InputError(
            f"score {score} is that of a CLIP-like host and host {host} is a vision-language LLM; "
            f"there are {', '.join(LVLM_SCORES)} and random for it"
        )
    if score in LVLM_SCORES and is_clip(host):
        raise InputError(
            f"score {score} is that of a vision-language LLM and host {host} is CLIP-like; "
            f"there are {', '.join(PAIR_SCORES)} for it"
        )


def make_scorer(spec: ScorerSpec, rank: int = 0) -> Scorer:
    """The scorer of a spec, on this process's device."""
    if not pairs_up(spec):
        from mmsae.filtering.scorers.lvlm import SaeVScorer

        return SaeVScorer(spec._replace(score="l0") if spec.score == "random" else spec, rank)
    return ClipScorer(spec, rank)


def pairs_up(spec: ScorerSpec) -> bool:
    """Whether pairs are scored under a CLIP-like host, rather than tokens under a vision-language LLM."""
    return spec.score not in LVLM_SCORES and not spec.host.startswith("lvlm:")
