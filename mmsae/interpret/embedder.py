"""The encoder whose embeddings a folder of evidence has, loaded again for its text or image tower, with a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmsae.interpret.evidence.folder import Evidence
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
    """

    def __init__(self, name: str, cache: Path | None = None, device: str = "auto", precision: str = "fp32"):
        self.name, self.cache, self.device, self.precision = name, cache, device, precision

    @classmethod
    def of(cls, evidence: Evidence, modality: str, **options: Any) -> Embedder | None:
        """That of a modality of some evidence; None where it has no embeddings."""
        name = evidence.about.get("embedder", {}).get(modality)
        return None if not name or evidence.embeddings(modality) is None else cls(name, **options)

    @cached_property
    def host(self) -> Encoder:
        """The host, loaded when it is first needed."""
        from mmsae.hosts import load_host, pick_device
        from mmsae.hosts.encoders.encoder import as_encoder

        return as_encoder(load_host(self.name, pick_device(self.device), self.precision), "naming latents")

    @property
    def reads_text(self) -> bool:
        """Whether it has a text tower."""
        return TEXT in self.host.modalities

    def phrases(self, phrases: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """``(V, width) float32`` unit vectors of phrases, the mean of unit vectors over templates (with ``{}``).

        Raises:
            InputError: The host has no text tower.
        """
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
