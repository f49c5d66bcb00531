"""A pursuit that spends on each row as many latents as a trained encoder would (arXiv 2410.14670, section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import SAEEncoder
from mmsae.sae.precodes import PursuitCodes
from mmsae.sae.selector import SelectContext, Selector
from mmsae.sae.variants.matching_pursuit import PursuitEncoder


class PursuitAtL0(PursuitEncoder):
    """Pursuit on the dictionary, at most as many latents a row as ``encoder`` and ``selector`` would choose.

    These two stay as they were trained: they count in eval mode and get no gradients. See
    :func:`mmsae.sae.with_pursuit`.

    Args:
        encoder: The trained encoder.
        selector: The trained selector.
        kind: ``mp``, ``omp`` or ``gp``; see :class:`PursuitEncoder`.
        sign: See :class:`PursuitEncoder`.
    """

    name = "pursuit_at_l0"

    def __init__(self, encoder: SAEEncoder, selector: Selector, kind: str = "gp", sign: str = "relu") -> None:
        super().__init__(kind, sign=sign)
        self.encoder, self.selector = encoder, selector
        self.train(self.training)

    def config(self) -> dict[str, Any]:
        parts = {"encoder": self.encoder, "selector": self.selector}
        return {"kind": self.kind, "sign": self.sign} | {k: {"name": p.name, **p.config()} for k, p in parts.items()}

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        """Allocate the parts that count."""
        self.encoder.build(d_in, d_sae, dictionaries)
        self.selector.build(d_sae, tuple(d_in))

    def train(self, mode: bool = True) -> PursuitAtL0:
        super().train(mode)
        self.encoder.eval()
        self.selector.eval()
        return self

    def loaded_(self) -> None:
        self.encoder.loaded_()
        self.selector.loaded_()

    def weights(self) -> dict[str, tuple[nn.Parameter, bool]]:
        """The trained encoder's by their names, and what its selector has learned as ``selector.NAME``."""
        learned = {f"encoder.selector.{name}": (p, False) for name, p in self.selector.named_parameters()}
        return self.encoder.weights() | learned

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> PursuitCodes:
        with torch.no_grad():
            values, _ = self.selector(self.encoder(x, dictionary, modality), SelectContext(modality, dictionary, x))
            l0 = (values != 0).sum(1)
        return self.pursue(x if dictionary.bias is None else x - dictionary.bias, dictionary.rows(), l0)
