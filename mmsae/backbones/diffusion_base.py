"""What :class:`~mmsae.backbones.base.Backbone` asks of hosts with one encoder per modality, refused by pipelines."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mmsae.backbones.base import Backbone
from mmsae.backbones.hooks import Port
from mmsae.backbones.tokens import Marks
from mmsae.types import InputError

NO_IMAGES = "a diffusion pipeline reads no images"


class TextToImage(Backbone):
    """A host that makes images of texts and embeds neither."""

    @property
    def endpoints(self) -> tuple[str, ...]:
        """None: sites are modules."""
        return ()

    def transform(self, train: bool = False) -> Callable:
        """Refused."""
        raise InputError(f"{NO_IMAGES}: host {self.hint} has no image transform.")

    def encode_image(self, images: Tensor) -> Tensor:
        """Refused."""
        raise InputError(f"{NO_IMAGES}: host {self.hint} has no image encoder.")

    def encode_text(self, ids: Tensor) -> Tensor:
        """Refused: there is no embedding of a text here, only states of its tokens."""
        raise InputError(f"host {self.hint} has no text embedding: read a site like text_encoder.final_layer_norm:out.")

    def _endpoint(self, name: str) -> Port:
        raise NotImplementedError("there are no endpoints")

    def _marks(self, modality: str, tokens: Tensor, ids: Tensor | None, is_map: bool) -> Marks:
        raise NotImplementedError("taps mark their tokens themselves")

    def _has_cls(self, modality: str) -> bool:
        return False

    def _probe_input(self, modality: str, n: int) -> Tensor:
        return self.tokenize([""] * n)
