"""Encoders: from normalised activations to pre-codes, one score per latent.

An encoder does not compute the pre-codes: it says what they are, as ``act((x @ weight.T) * scale + bias)`` with a
non-decreasing ``act``. So a selector can rank without keeping the (N, d_sae) product and take gradients for the
entries that it kept, and a loss can ask for the columns that it needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmsae.kernels import chunked_topk, sampled_linear
from mmsae.moved import earlier
from mmsae.sae.dictionary import Dictionary
from mmsae.types import InputError

__getattr__ = earlier(__name__)


def identity(u: Tensor) -> Tensor:
    """No activation."""
    return u


class PreCodes(NamedTuple):
    """Pre-codes ``u = act((x @ weight.T) * scale + bias)``, not yet computed."""

    x: Tensor  #: ``(N, d)``.
    weight: Tensor  #: ``(d_sae, d)``.
    bias: Tensor | None  #: ``(d_sae,)`` or None.
    act: Callable[[Tensor], Tensor] = identity  #: Elementwise, non-decreasing.
    #: ``(N, 1)`` 1 for rows that may be coded and 0 for rows that carry nothing, or None (all may).
    valid: Tensor | None = None
    scale: Tensor | None = None  #: ``(d_sae,)`` factor of each latent, or None (1).

    def dense(self) -> Tensor:
        """``(N, d_sae)`` pre-codes."""
        return self._finish(F.linear(self.x, self.weight), self.bias, self.scale)

    def columns(self, ids: Tensor) -> Tensor:
        """``(N, len(ids))`` pre-codes of some latents."""
        bias = None if self.bias is None else self.bias[ids]
        return self._finish(F.linear(self.x, self.weight[ids]), bias, None if self.scale is None else self.scale[ids])

    def topk(self, k: int, score: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Linear parts (before ``act``) and ids, both ``(N, k)``, of the k largest of each row; no gradients."""
        return chunked_topk(self.x, self.weight, self.bias, k, score, self.scale)

    def at(self, indices: Tensor, linear: Tensor | None = None) -> Tensor:
        """``(N, k)`` pre-codes of chosen latents, with gradients for these entries only; ``linear`` if known."""
        return self._activate(sampled_linear(self.x, self.weight, self.bias, indices, linear, self.scale))

    def _finish(self, linear: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        linear = linear if scale is None else linear * scale
        return self._activate(linear if bias is None else linear + bias)

    def _activate(self, linear: Tensor) -> Tensor:
        u = self.act(linear)
        return u if self.valid is None else u * self.valid


class SAEEncoder(nn.Module):
    """Base of an SAE's encoders. ``weight`` is stored ``(d_sae, d_in)``: rows are what is gathered and normalised."""

    name: str

    def config(self) -> dict:
        """Arguments that rebuild this part."""
        raise NotImplementedError

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        """Allocate for ``{modality: width}``; dictionaries are built already (tied initialisation reads them)."""
        raise NotImplementedError

    def centre_(self, means: Mapping[str, Tensor]) -> None:
        """Start with pre-codes that are about ``{modality: (d,) mean of the rows}``, where a bias can do that."""

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> PreCodes:
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

    def __init__(self, bias: bool = True, subtract_decoder_bias: bool = True):
        super().__init__()
        self.use_bias, self.subtract_decoder_bias = bias, subtract_decoder_bias

    def config(self) -> dict:
        return {"bias": self.use_bias, "subtract_decoder_bias": self.subtract_decoder_bias}

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        """Allocate ``weight (d_sae, d_in)`` as a copy of the atoms of the first dictionary, unit norm."""
        _one_width(d_in)
        atoms = next(iter(dictionaries.values())).rows().detach()
        self.weight = nn.Parameter(F.normalize(atoms).clone())
        self.bias = nn.Parameter(torch.zeros(d_sae)) if self.use_bias else None

    @torch.no_grad()
    def centre_(self, means: Mapping[str, Tensor]) -> None:
        """Move the bias, unless the decoder's, which holds the mean, is taken off the input anyway."""
        if self.bias is not None and not self.subtract_decoder_bias:
            mean = torch.stack(list(means.values())).mean(0)
            self.bias.copy_(-self.weight @ mean.to(self.weight))

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> PreCodes:
        if self.subtract_decoder_bias and dictionary.bias is not None:
            x = x - dictionary.bias
        return PreCodes(x, self.weight, self.bias)


def distance_score(cosine: Tensor) -> Tensor:
    """``2 - ||xn - wn||`` of two unit vectors as a function of their cosine.

    The radicand is kept at 1e-6 or more: at distance 0 the gradient of the square root is infinite.
    """
    return 2.0 - (2.0 - 2.0 * cosine).clamp(min=1e-6).sqrt()


class DistanceEncoder(SAEEncoder):
    """``u = 2 - || x/|x| - w/|w| ||``: distance on the unit sphere (VL-SAE, arXiv 2510.21323, section 3.1 of its spec).

    Values lie in [0, 2] and grow with the cosine; the scale of x and of every prototype is irrelevant. Always computed
    in float32: half precision creates ties and loses members of the top-k. Zero rows have no direction, so no code.
    """

    name = "distance"

    def config(self) -> dict:
        return {}

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

    def config(self) -> dict:
        return {"encoder": {"name": self.template[0].name, **self.template[0].config()}}

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        for m, d in d_in.items():
            part = copy.deepcopy(self.template[0])
            part.build({m: d}, d_sae, {m: dictionaries[m if m in dictionaries else "shared"]})
            self.encoders[m] = part

    def centre_(self, means: Mapping[str, Tensor]) -> None:
        for m, mean in means.items():
            self.encoders[m].centre_({m: mean})

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> PreCodes:
        return self.encoders[modality](x, dictionary, modality)
