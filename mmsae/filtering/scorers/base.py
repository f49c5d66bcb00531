"""What scores samples for filtering: the scores, how a scorer is made, and the reasons that it gives."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmsae.hosts import Host
from mmsae.kernels.pairs import code_norm, paired_read
from mmsae.metrics.pairs.sample_scores import SCORES as TOKEN_SCORES
from mmsae.sae import SAE
from mmsae.types import IMAGE, TEXT, Codes, ImageTextBatch, InputError

ALWAYS = ("clip", "clip_centred", "pair_code", "pair_weighted")
ANY_HOST = ("random", "query")
PAIR_SCORES = (*ALWAYS, "pair_calibrated", *ANY_HOST)
SCORES = (*PAIR_SCORES, *TOKEN_SCORES)
NAMED = 5  # concepts named per sample and side


class ScorerSpec(NamedTuple):
    """How to make a scorer; plain values, so that it travels to other processes."""

    sae: str  #: SAE folder or hub id.
    host: str  #: Name of the host; empty: the reload hint in the SAE's sites.
    score: str  #: Name of the score to keep by.
    weights: str  #: File of fitted weights; empty while they are being fitted.
    device: str  #: ``cpu``, ``cuda`` or ``auto``.
    precision: str  #: ``fp32``, ``bf16`` or ``fp16``.
    seed: int  #: Seed of the score ``random``.
    other_site: bool  #: Whether an SAE of another host is accepted.
    text: str = "question"  #: Under a vision-language LLM: ``question``, or ``question+answer``.
    images: bool = False  #: Whether the SAE reads images alone, so that there are no pairs to score.

    @property
    def pairs(self) -> bool:
        """Whether pairs are scored under a CLIP-like host, rather than tokens under a vision-language LLM."""
        return not (self.images or self.score in TOKEN_SCORES or self.host.startswith("lvlm:"))


class Only(NamedTuple):
    """Concepts that one side of each sample has and the other lacks, strongest first."""

    latents: Tensor  #: ``(B, n)`` int64.
    strengths: Tensor  #: ``(B, n)``; 0 where there are fewer than n.


class Reasons(NamedTuple):
    """Why samples score as they do."""

    text_only: Only  #: What the text has and the image lacks.
    image_only: Only  #: The reverse.
    #: ``{column: (B,)}`` counts to tabulate beside the scores, ``l0_image`` and ``l0_text`` say.
    counts: dict[str, Tensor]
    codes: dict[str, Codes]  #: ``{modality: codes, one row a sample}``, for choosing sets.

    @classmethod
    def of(cls, codes: dict[str, Codes], weights: Tensor) -> Reasons:
        """What the two sides do not share, each concept by its cross-modal weight."""
        counts = {f"l0_{m}": codes[m].l0() for m in (IMAGE, TEXT)}
        return cls(only(codes[TEXT], codes[IMAGE], weights), only(codes[IMAGE], codes[TEXT], weights), counts, codes)


class Scorer(Protocol):
    """What filtering needs of a score."""

    sae: SAE  #: The SAE.
    host: Host  #: What gives its activations.
    columns: tuple[str, ...]  #: All scores that it tabulates.
    fingerprints: dict[str, str]  #: ``{"sae": ..., "host": ...}``, hashes of what scores.
    device: str  #: Kind of device, ``cpu`` or ``cuda``.

    def score(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """``{column: (B,)}``; a sample with a score that is not finite is dropped and counted."""

    def reasons(self, batch: ImageTextBatch) -> Reasons:
        """Why, for the same batch (a scorer may keep what it computed for it last)."""


def only(has: Codes, lacks: Codes, weights: Tensor, n: int = NAMED) -> Only:
    """Up to n latents a row that fired on one side and not on the other.

    Their strength is the share in the norm of that side's code times the cross-modal weight (``(d_sae,)`` in [0, 1]): a
    latent that fires in one modality only, whatever the pair, has weight 0 and is no reason.
    """
    if has.indices is None or lacks.indices is None:
        ids = torch.arange(has.d_sae, device=has.values.device).expand(has.n, -1)
        value, other = has.to_dense(), lacks.to_dense()
    else:
        ids, value = has.indices, has.values
        other = paired_read(ids, lacks.values, lacks.indices)
    strength = value.abs() * weights[ids] / code_norm(has).clamp(min=1e-12)[:, None]
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
    """Refuse a score that does not exist, or not for this kind of host."""
    if score not in SCORES:
        raise InputError(f"no score {score!r}; there are {', '.join(SCORES)}")
    if host.startswith("lvlm:") and score in PAIR_SCORES and score not in ANY_HOST:
        raise InputError(
            f"score {score} is that of a CLIP-like host and host {host} is a vision-language LLM; "
            f"there are {', '.join((*TOKEN_SCORES, *ANY_HOST))} for it"
        )
    if score in TOKEN_SCORES and is_clip(host):
        raise InputError(
            f"score {score} is that of a vision-language LLM and host {host} is CLIP-like; "
            f"there are {', '.join(PAIR_SCORES)} for it"
        )
