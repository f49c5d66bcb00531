"""Options that the commands of this folder share, and the names that they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmsae.options import SAERun
from mmsae.types import InputError

KINDS = ("raw", "code", "recon", "resid")  # features of an image: before the SAE, its codes, what it makes of it
ALPHAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
LOGITS, DISTANCES = ("msp", "max_logit", "energy", "vim", "react"), ("mds", "rmds", "knn")
NATIVE = ("recon", "cap_spearman", "cap_energy", "rarity", "support")  # detectors that an SAE brings with it
EMBED = "embed"  # the host's own embeddings, as a kind of features
RANDOM, PCA, WHITENED, STATISTICS = "random", "pca", "whitened", "statistics"


@dataclass(frozen=True)
class EvaluationRun(SAERun):
    """Where and how the host and the SAE compute."""

    workers: int = 0
    """Decoding processes; 0 decodes in the main process."""
    fault_limit: float = 0.05
    """Largest share of samples that may be unusable."""
    cache: str = ""
    """Folder in which the host's activations are kept, so that another SAE of this site, or another of the commands
    ``ood``, ``evaluate`` and ``zeroshot``, need not run the host again; empty: none."""

    def __post_init__(self) -> None:
        there = next((p for p in (Path(self.cache), *Path(self.cache).parents) if p.exists()), None)
        if there is not None and not there.is_dir():
            raise InputError(f"--cache is {self.cache}, but {there} is a file and no folder")


@dataclass(frozen=True)
class Foreign:
    """SAEs of other libraries, whose files do not say where their host is read."""

    site: str = ""
    """Where the host is read, as ``blocks.11:out[patches]``, for SAEs that do not say it."""
    standardise: bool | None = None
    """Whether they are of rows less their mean, divided by one standard deviation; both are taken from the suite's
    training images. Default: those of visaebench are."""


@dataclass(frozen=True)
class Drawing:
    """The page of images."""

    gallery: int = 0
    """Write gallery.html, too: the training images that so many latents answer to most, of the purest and of any, with
    the place where they fire at token sites, and the same of random weights."""
    names: str = ""
    """names.json of ``mmsae name``: what latents are called in gallery.html. Default: that in ``evidence`` beside the
    SAE's folder, where there is one of this SAE."""

    def __post_init__(self) -> None:
        if self.gallery < 0:
            raise InputError(f"--gallery is {self.gallery}, it must be a number of latents, or 0 for no page")
        if self.names and not self.gallery:
            raise InputError("--names is for the page of --gallery, which is not asked for")


@dataclass(frozen=True)
class Labelled:
    """Which images, and their labels."""

    label: str = "cls"
    """``cls``, or the field of json that holds the label. Where it is empty there are no labels: ``ood`` has detectors
    without classes then."""
    limit: int | None = None
    """Largest number of images per set; which ones is decided by a hash of their uid."""


@dataclass(frozen=True)
class ClassTexts:
    """Classes as texts."""

    classes: str = ""
    """File of class names: text (one a line) or json (a list, or {label: name}). Default: the names that the data's
    json field ``class`` or label gives; ``ood`` has no logits by text then."""
    templates: str = "simple"
    """``simple`` (open_clip's 7), ``openai`` (its 80 for ImageNet), or a file, one template with {} a line."""


@dataclass(frozen=True)
class OODSets:
    """The sets beside the in-distribution (ID) and out-of-distribution (OOD) test sets."""

    near: tuple[str, ...] = ()
    """Names of the near-OOD sets; the others are far."""
    train: str | list[str] = ""
    """ID shards for fitting, all that the SAE has seen for example, and for choosing settings (a third of them by uid,
    where there is no ``val``)."""
    val: str | list[str] = ""
    """ID shards for choosing settings."""
    ood_val: tuple[str, ...] = ()
    """OOD validation set as NAME=SHARDS, on which settings are chosen; default: scrambled and noise images made from ID
    validation images."""
    ood_label: str = ""
    """Field of json that ``exclude`` is about, in the OOD sets; default: ``label``."""
    exclude: str = ""
    """File with label values or class names to leave out of the OOD sets, one a line."""
    fit_limit: int | None = None
    """Largest number of images for ``train`` and for ``val``; default: ``limit``."""


@dataclass(frozen=True)
class Detection:
    """Which detectors read what."""

    logits: Literal["auto", "host", "zeroshot", "probe"] = "auto"
    """Whose logits detectors read: ``host`` (its own classifier, of raw features and reconstructions where it reads
    them, else of its embeddings), ``zeroshot`` (by ``classes``), ``probe`` (linear, of the ID labels), or ``auto``: the
    first of these that there is. Features without such a classifier get a linear probe."""
    features: tuple[str, ...] = KINDS
    """Features that detectors read: raw, code, recon, resid."""
    scores: tuple[str, ...] = (*LOGITS, *DISTANCES, *NATIVE)
    """Detectors."""
    controls: tuple[str, ...] = (RANDOM, PCA, STATISTICS)
    """Controls: random (an untrained SAE), pca (as many components as latents are on), statistics (of pixels)."""
    pool: Literal["max", "mean"] = "max"
    """How the codes of an image's tokens become one, at token sites."""
