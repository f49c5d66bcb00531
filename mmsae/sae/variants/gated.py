"""Gated SAE (arXiv 2404.16014): one head says whether a latent fires, another how strongly, over shared directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import SAEEncoder, _one_width
from mmsae.sae.losses import LossContext, LossTerm, Outputs
from mmsae.sae.precodes import DensePreCodes
from mmsae.types import InputError


class GatedEncoder(SAEEncoder):
    """``p = (x - b_dec) W.T``; ranked is the gate ``p + b_gate``, kept the magnitude ``[exp(r_mag) * p + b_mag]+``.

    With selector ``relu`` a latent fires where its gate is positive. The gate gets no gradient from the code: an L1
    term ``on="gate"`` and :class:`GateAux` train it.
    """

    name = "gated"
    subtract_decoder_bias = True
    file_names: ClassVar[Mapping[str, tuple[str, bool]]] = {"weight": ("W_enc", True)}

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        """Allocate ``weight (d_sae, d_in)`` as a copy of the first dictionary's atoms, unit norm; the rest is 0."""
        self.weight = nn.Parameter(torch.empty(d_sae, _one_width(d_in)))
        self.tie_(dictionaries)
        self.b_gate, self.b_mag, self.r_mag = (nn.Parameter(torch.zeros(d_sae)) for _ in range(3))

    @torch.no_grad()
    def tie_(self, dictionaries: Mapping[str, Dictionary]) -> None:
        self.weight.copy_(F.normalize(next(iter(dictionaries.values())).rows()))

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        self.weight.mul_(factor[:, None])
        self.b_gate.mul_(factor)
        self.b_mag.mul_(factor)

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> DensePreCodes:
        p = F.linear(x if dictionary.bias is None else x - dictionary.bias, self.weight)
        return DensePreCodes(p + self.b_gate, (self.r_mag.exp() * p + self.b_mag).relu())


class GateAux(LossTerm):
    """The positive part of the gate must reconstruct too, through the dictionary as a constant (arXiv 2404.16014).

    ``coefficient * E||target - ([u]+ sg(D) + sg(b_dec))||^2`` in FVU units, mean over modalities: without it nothing
    but L1 would train the gate. Dictionaries get no gradient, but for the bias that the encoder takes off the input.
    """

    name = "gate_aux"

    def __init__(self, coefficient: float = 1.0) -> None:
        super().__init__()
        self.coefficient = coefficient

    def check(self, sae: Any) -> None:
        encoder = getattr(sae.encoder, "template", [sae.encoder])[0]
        if not isinstance(encoder, GatedEncoder):
            raise InputError(f"gate_aux trains the gate of encoder 'gated', this SAE's encoder is {encoder.name!r}")

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        total = 0.0
        for m, out in outputs.items():
            dictionary = ctx.sae.dictionary(m)
            recon = out.pre.u.relu() @ dictionary.rows().detach()
            if dictionary.bias is not None:
                recon = recon + dictionary.bias.detach()
            total = total + (out.target - recon).square().sum(1).mean() / ctx.sae.normaliser.variance(m)
        return self.coefficient * total / len(outputs)
