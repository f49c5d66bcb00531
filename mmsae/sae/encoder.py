"""Encoders: from normalised activations to pre-codes, one score per latent; see :mod:`mmsae.sae.precodes`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmsae.moved import earlier
from mmsae.sae.dictionary import Dictionary
from mmsae.sae.part import Part
from mmsae.sae.precodes import DensePreCodes, PreCodes
from mmsae.types import InputError

__getattr__ = earlier(__name__)


class SAEEncoder(Part):
    """Base of an SAE's encoders. ``weight`` is stored ``(d_sae, d_in)``: rows are what is gathered and normalised."""

    is_pursuit = False  #: Whether the encoder chooses latents by itself (its pre-codes are ``PursuitCodes``).
    takes_precision = False  #: Whether latents are chosen by one product, which may be of less than float32.
    sets_frequency = False  #: Whether the encoder itself sees to how often latents fire, so that no loss term may.
    file_names: ClassVar[Mapping[str, tuple[str, bool]]] = {"weight": ("W_enc", True), "bias": ("b_enc", False)}

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        """Allocate for ``{modality: width}``; dictionaries are built already (tied initialisation reads them)."""
        raise NotImplementedError

    def tie_(self, dictionaries: Mapping[str, Dictionary]) -> None:
        """Start as the dictionaries are now, where the start is tied; asked when atoms were taken from rows."""

    def centre_(self, means: Mapping[str, Tensor]) -> None:
        """Start with pre-codes that are about ``{modality: (d,) mean of the rows}``, where a bias can do that."""

    def scale_(self, factor: Tensor) -> None:
        """Multiply every pre-code, and what is kept of it, by ``factor (d_sae,)``, above 0.

        Raises:
            InputError: The encoder has no weights that could hold it.
        """
        raise InputError(f"encoder {self.name!r} has no weights that a factor of its pre-codes could go into")

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> PreCodes | DensePreCodes:
        """Pre-codes of normalised rows ``x (N, d)``."""
        raise NotImplementedError


def _one_width(d_in: Mapping[str, int]) -> int:
    widths = set(d_in.values())
    if len(widths) != 1:
        named = ", ".join(f"{m} {d}" for m, d in d_in.items())
        raise InputError(f"a shared encoder needs equal widths, not {named}; use an encoder per modality")
    return widths.pop()


class AffineEncoder(SAEEncoder):
    """``u = (x - b_dec) W.T + b_enc``; W starts as the dictionary (tied initialisation).

    Args:
        bias: Whether there is a ``b_enc``.
        subtract_decoder_bias: Whether the decoder's bias is taken off the input first.
    """

    name = "affine"
    takes_precision = True

    def __init__(self, bias: bool = True, subtract_decoder_bias: bool = True):
        super().__init__()
        self.use_bias, self.subtract_decoder_bias = bias, subtract_decoder_bias

    def config(self) -> dict:
        return {"bias": self.use_bias, "subtract_decoder_bias": self.subtract_decoder_bias}

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        """Allocate ``weight (d_sae, d_in)`` as a copy of the atoms of the first dictionary, unit norm."""
        self.weight = nn.Parameter(torch.empty(d_sae, _one_width(d_in)))
        self.tie_(dictionaries)
        self.bias = nn.Parameter(torch.zeros(d_sae)) if self.use_bias else None

    @torch.no_grad()
    def tie_(self, dictionaries: Mapping[str, Dictionary]) -> None:
        self.weight.copy_(F.normalize(next(iter(dictionaries.values())).rows()))

    @torch.no_grad()
    def centre_(self, means: Mapping[str, Tensor]) -> None:
        """Move the bias, unless the decoder's, which holds the mean, is taken off the input anyway."""
        if self.bias is not None and not self.subtract_decoder_bias:
            mean = torch.stack(list(means.values())).mean(0)
            self.bias.copy_(-self.weight @ mean.to(self.weight))

    @torch.no_grad()
    def scale_(self, factor: Tensor) -> None:
        self.weight.mul_(factor[:, None])
        if self.bias is not None:
            self.bias.mul_(factor)

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> PreCodes:
        centre = dictionary.bias if self.subtract_decoder_bias else None
        return PreCodes.centred(x, centre, self.weight, self.bias)


def distance_score(cosine: Tensor) -> Tensor:
    """``2 - ||xn - wn||`` of two unit vectors as a function of their cosine.

    The radicand is kept at 1e-6 or more: at distance 0 the gradient of the square root is infinite.
    """
    return 2.0 - (2.0 - 2.0 * cosine).clamp(min=1e-6).sqrt()


class DistanceEncoder(SAEEncoder):
    """``u = 2 - || x/|x| - w/|w| ||``: distance on the unit sphere (VL-SAE, arXiv 2510.21323, section 3.1 of its spec).

    Values lie in [0, 2] and grow with the cosine; the scale of x and of every prototype is irrelevant. Zero rows have
    no direction, so no code.
    """

    name = "distance"
    takes_precision = True

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        """Allocate prototypes ``weight (d_sae, d_in)`` ~ U(-1/sqrt(d), 1/sqrt(d))."""
        d = _one_width(d_in)
        self.weight = nn.Parameter(torch.empty(d_sae, d).uniform_(-(d**-0.5), d**-0.5))

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> PreCodes:
        norm = x.norm(dim=1, keepdim=True)
        # prototypes are scaled after the product: their norms cost one pass, normalised copies and their gradients five
        scale = self.weight.norm(dim=1).clamp(min=1e-12).reciprocal()
        return PreCodes(x / norm.clamp(min=1e-12), self.weight, None, distance_score, (norm > 0).to(x.dtype), scale)


class PerModalityEncoder(SAEEncoder):
    """One copy of an encoder for each modality, which may then differ in width.

    Args:
        encoder: The encoder that is copied; each copy is initialised by itself.
    """

    name = "per_modality"

    def __init__(self, encoder: SAEEncoder):
        super().__init__()
        self.template = [encoder]  # in a list: it is a recipe, not a submodule with parameters of its own
        self.encoders = nn.ModuleDict()
        self.sets_frequency, self.takes_precision = encoder.sets_frequency, encoder.takes_precision

    def config(self) -> dict:
        return {"encoder": {"name": self.template[0].name, **self.template[0].config()}}

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        for m, d in d_in.items():
            part = copy.deepcopy(self.template[0])
            part.build({m: d}, d_sae, {m: dictionaries[m if m in dictionaries else "shared"]})
            self.encoders[m] = part

    def tie_(self, dictionaries: Mapping[str, Dictionary]) -> None:
        for m, part in self.encoders.items():
            part.tie_({m: dictionaries[m if m in dictionaries else "shared"]})

    def centre_(self, means: Mapping[str, Tensor]) -> None:
        for m, mean in means.items():
            self.encoders[m].centre_({m: mean})

    def check(self, sae: Any) -> None:
        if self.template[0].is_pursuit:
            raise InputError("a pursuit has no weights of its own to give every modality: use it without per_modality")
        self.template[0].check(sae)

    def fit_(self, rows: Mapping[str, Tensor]) -> None:
        for m, x in rows.items():
            self.encoders[m].fit_({m: x})

    def after_step_(self) -> None:
        for part in self.encoders.values():
            part.after_step_()

    def weights(self) -> dict[str, tuple[nn.Parameter, bool]]:
        """Every encoder's, with the modality as suffix (``W_enc.image``)."""
        return {f"{name}.{m}": w for m, e in self.encoders.items() for name, w in e.weights().items()}

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> PreCodes | DensePreCodes:
        return self.encoders[modality](x, dictionary, modality)
