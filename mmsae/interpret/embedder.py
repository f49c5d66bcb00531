"""The encoder whose embeddings a folder of evidence has, loaded again for its text or image tower, with a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.evidence.hosts import NamedHost
from mmsae.types import IMAGE, TEXT, InputError

if TYPE_CHECKING:
    from mmsae.hosts.encoders.encoder import Encoder


class Embedder:
    """Vectors of phrases and images in the space of the embeddings of a folder of evidence.

    Args:
        name: Name of the host.
        cache: Folder in which vectors of phrases are kept; None keeps none.
        device: Where it runs.
        precision: Arithmetic.
        known: What some evidence knows of it, where it is that of its embeddings.
    """

    def __init__(
        self,
        name: str,
        cache: Path | None = None,
        device: str = "auto",
        precision: str = "fp32",
        known: NamedHost | None = None,
    ):
        self.name, self.cache, self.device, self.precision, self.known = name, cache, device, precision, known

    @classmethod
    def of(cls, evidence: Evidence, modality: str, **options: Any) -> Embedder | None:
        """That of a modality of some evidence; None where it has no embeddings."""
        known = NamedHost.embedder_of(evidence, modality)
        return None if known is None else cls(known.now, known=known, **options)

    @cached_property
    def host(self) -> Encoder:
        """The host, loaded when it is first needed.

        Raises:
            InputError: It cannot be loaded, or is not the one that the evidence knows.
        """
        from mmsae.hosts import load_host, pick_device
        from mmsae.hosts.encoders.encoder import as_encoder

        device = pick_device(self.device)
        load = partial(load_host, self.name) if self.known is None else self.known.load
        return as_encoder(load(device, self.precision), "naming latents")

    @property
    def reads_text(self) -> bool:
        """Whether it has a text tower."""
        return TEXT in self.host.modalities

    @property
    def knows_words(self) -> bool:
        """Whether phrases, or at least names of classes, have vectors."""
        return self.reads_text or bool(self.classes)

    @cached_property
    def classes(self) -> dict[str, np.ndarray]:
        """``{class name: (width,) float32 unit vector}`` of a host with a linear classifier of ImageNet's 1,000
        classes.

        The vectors are the classifier's rows about their mean: what an embedding's logit is, but for the bias and what
        all classes share. Empty for other hosts.
        """
        found = getattr(self.host, "classifier", None)
        if found is None or len(found[0]) != 1000:
            return {}
        rows = found[0].numpy().astype(np.float64)
        rows -= rows.mean(0)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return dict(zip(imagenet_names(), rows.astype(np.float32), strict=True))

    def phrases(self, phrases: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """``(V, width) float32`` unit vectors of phrases, the mean of unit vectors over templates (with ``{}``).

        A host without a text tower knows the names of its :attr:`classes`.

        Raises:
            InputError: The host has no text tower, and a phrase is none of its classes.
        """
        if not self.reads_text:
            if lost := [p for p in phrases if p not in self.classes]:
                raise InputError(f"host {self.name} has no text tower, and {lost[0]!r} is no class that it knows")
            return np.stack([self.classes[p] for p in phrases]) if len(phrases) else np.zeros((0, 1), np.float32)
        if not len(phrases):
            return np.zeros((0, 1), np.float32)
        said = json.dumps([self.host.fingerprint, self.precision, list(phrases), list(templates)]).encode()
        path = self.cache and self.cache / f"phrases-{hashlib.blake2b(said, digest_size=8).hexdigest()}.npy"
        if path and path.exists():
            return np.load(path, allow_pickle=False)
        vectors = self._phrases(phrases, templates)
        if path:
            from mmsae.files import atomic_file

            with atomic_file(path) as temp, open(temp, "wb") as f:
                np.save(f, vectors, allow_pickle=False)
        return vectors

    def _phrases(self, phrases: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        from mmsae.evaluation.zeroshot.head import text_classes

        vectors = text_classes(self.host, list(phrases), list(templates)).numpy()
        return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)

    def images(self, images: Sequence[Any], batch: int = 64) -> np.ndarray:
        """``(n, width) float32`` unit vectors of PIL images."""
        import torch

        if IMAGE not in self.host.modalities:
            raise InputError(f"host {self.host.hint} has no image encoder")
        transform, parts = self.host.transform(), []
        for lo in range(0, len(images), batch):
            pixels = torch.stack([transform(i.convert("RGB")) for i in images[lo : lo + batch]])
            parts.append(self.host.encode_image(pixels).cpu().numpy())
        vectors = np.concatenate(parts) if parts else np.zeros((0, 1))
        return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def known_vectors(embedder: Embedder, phrases: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """``(V, width)`` vectors of phrases, NaN for those that are no class of a host without a text tower."""
    if embedder.reads_text:
        return embedder.phrases(phrases, templates)
    known = [p for p in phrases if p in embedder.classes]
    width = len(next(iter(embedder.classes.values())))
    out = np.full((len(phrases), width), np.nan, np.float32)
    if known:
        out[[p in embedder.classes for p in phrases]] = embedder.phrases(known, templates)
    return out


def imagenet_names() -> list[str]:
    """Names of ImageNet's 1,000 classes, by number; a second class of one name has its WordNet id behind it."""
    from timm.data import ImageNetInfo

    table, out = ImageNetInfo("imagenet-1k"), {}
    for i in range(table.num_classes()):
        said = table.index_to_description(i).split(",")[0]
        out[said if said not in out else f"{said} ({table.index_to_label_name(i)})"] = i
    return list(out)
