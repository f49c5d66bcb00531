"""Options of the commands on vision-language hosts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmsae.errors import InputError
from mmsae.lvlm.decoding.settings import PRESETS, Settings
from mmsae.options import SAERun, at_least

RUN = SAERun(batch_size=8, workers=0)
STRATEGIES = ("random", "popular", "adversarial")
TEMPLATE = "Is there {a} {object} in the image?"
PATCH_SCORES = ("cos", "l0", "l1", "co_l0", "norm", "random")


@dataclass(frozen=True)
class Answering:
    """Ways of answering that are compared."""

    methods: tuple[str, ...] = ("greedy",)
    """``greedy`` (always), ``sample``, ``concept`` (with its control ``beta``), ``ssl``, ``save``."""
    sae: str | None = None
    """SAE of pooled image and text states, for ``concept``."""
    aligner: str | None = None
    """Folder or published file of its aligner."""
    site: str | None = None
    """Where concept decoding edits (``layers.30:out``); default: the SAE's site."""
    settings: Settings = PRESETS["pope"]
    """Strengths of concept decoding; the default is published for LLaVA-1.5."""
    token_sae: str | None = None
    """SAE on tokens, for ``ssl`` and ``save``."""
    probe: str | list[str] | None = None
    """Other labelled shards, on which their directions are found."""
    gamma: float = 0.2
    """Strength of these directions, in norms of the state."""


@dataclass(frozen=True)
class ImageLabels:
    """Objects of the images."""

    images: int = 500
    """Number of images."""
    object_field: str = "objects"
    """Field of json that lists the objects of an image."""
    object_names: tuple[str, ...] = ()
    """Fields that make an object's name where objects are dicts, e.g. [colour, shape]."""


@dataclass(frozen=True)
class Definition:
    """What the weight of a latent is."""

    mode: str = "all_pairs"
    """``all_pairs``, ``rank_matched`` or ``centroid``."""
    selection: str = "per_modality"
    """``per_modality``: the strongest tokens of each side; ``pooled``: those among the strongest ``n_pool`` of both
    sides (the published code)."""
    n_pool: int = 30
    """See ``selection``."""
    n_side: int = 5
    """Tokens of each side that are compared; latents with fewer have no weight."""
    delta: float = 0.0
    """Activations up to this one are no evidence. The published 1.0 is in units of its own scaled states."""
    delta_quantile: float | None = None
    """Instead of ``delta``: a quantile of the positive activations."""
    center: bool = False
    """Take the mean state off first."""


@dataclass(frozen=True)
class TokenSample:
    """Which tokens are looked at."""

    text: Literal["question", "question+answer"] = "question"
    """``question``: prompt and image alone, as in the published scores; ``question+answer``: with json's answer."""
    samples: int | None = 1000
    """About this many samples are looked at, chosen by a hash of their uid; null for all."""
    seed: int = 0
    """Seed of the choice of samples."""


@dataclass(frozen=True)
class PatchChoice:
    """Which patches go black, and what is asked then."""

    scores: tuple[str, ...] = PATCH_SCORES
    """Scores of patches: cos, l0, l1, co_l0; norm (of the state, without SAE) and random are controls."""
    keep: tuple[float, ...] = (0.75, 0.5, 0.25)
    """Shares of the patches that stay."""
    answers: tuple[str, ...] = ()
    """Only samples with one of these answers; default: all that have one."""
    samples: int | None = None
    """The first so many of every shard; null for all."""
    max_new_tokens: int = 4
    """Most tokens of an answer, which is right where it begins with json's."""
    seed: int = 0
    """Seed of random patches and of ties."""

    def check(self, weights: bool) -> None:
        """Refuse what makes no sense, and ``cos`` without ``weights``."""
        at_least(1, max_new_tokens=self.max_new_tokens)
        if unknown := [s for s in self.scores if s not in PATCH_SCORES] or [""] * (not self.scores):
            raise InputError(f"no score {unknown[0]!r} of patches; there are {', '.join(PATCH_SCORES)}")
        if any(not 0 < share <= 1 for share in self.keep):
            raise InputError(f"keep is {list(self.keep)}; shares are above 0 and at most 1")
        if "cos" in self.scores and not weights:
            raise InputError("score cos needs cross-modal weights: give --weights, the folder that mmsae weights wrote")
