"""A one-modality SAE in the plainest terms, for libraries that know fewer parts: normalisers folded into weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmsae.sae import SAE, AffineEncoder, GatedEncoder, GroupMax, PerModalityEncoder, PursuitEncoder, ReLU, TopK
from mmsae.sae.thresholds import thresholds
from mmsae.types import InputError

ROWS = {"none": "as they are", "unit": "divided by their norm", "standardise": "standardised one by one"}


@dataclass(frozen=True)
class Plain:
    """What a one-modality SAE computes: ``u = (y - s b_dec) W_enc + b_enc``, codes by ``kind``, ``z W_dec + b_dec``.

    ``y`` is a row, or a row normalised by itself alone; a mean and a scale that the SAE has are in the weights.
    """

    kind: str  #: ``relu``, ``topk``, ``abstopk``, ``groupmax``, ``jumprelu``, ``gated`` or ``matching_pursuit``.
    #: ``W_enc (d, F)``, ``b_enc (F,)``, ``W_dec (F, d)``, ``b_dec (d,)``; ``threshold (F,)`` of JumpReLU; ``b_gate``,
    #: ``b_mag`` and ``r_mag`` in place of ``b_enc`` where it is gated.
    tensors: dict[str, Tensor]
    k: int | None = None  #: Latents of a row, where the kind has such a number.
    subtract: bool = True  #: ``s``: whether the encoder subtracts the decoder's bias.
    rows: str = "none"  #: Of which entry of ``ROWS`` ``y`` is.
    encoder: PursuitEncoder | None = None  #: The pursuit, where that is the kind.

    @property
    def shape(self) -> tuple[int, int]:
        """``(latents, width)``."""
        return tuple(self.tensors["W_dec"].shape)

    def subtracting(self, subtract: bool) -> Plain:
        """The same function with the decoder's bias subtracted by the encoder, or not."""
        if subtract == self.subtract or self.kind == "matching_pursuit":
            return self
        shift = self.tensors["b_dec"] @ self.tensors["W_enc"]
        return replace(self._plus(shift if subtract else -shift), subtract=subtract)

    def _plus(self, shift: Tensor) -> Plain:
        """With ``(F,)`` more in every linear part."""
        t = dict(self.tensors)
        if self.kind == "gated":
            t["b_gate"], t["b_mag"] = t["b_gate"] + shift, t["b_mag"] + shift * t["r_mag"].exp()
        else:
            t["b_enc"] = t["b_enc"] + shift
        return replace(self, tensors=t)

    def folded(self, mean: Tensor, factor: float) -> Plain:
        """The same function of rows from which nobody takes ``mean (d,)``, and that nobody multiplies by ``factor``."""
        p = self.subtracting(False)  # so that the two uses of the bias can change apart
        p = p._plus(-factor * (mean @ p.tensors["W_enc"]))
        t = dict(p.tensors)
        t["W_enc"], t["W_dec"], t["b_dec"] = t["W_enc"] * factor, t["W_dec"] / factor, t["b_dec"] / factor + mean
        return replace(p, tensors=t)

    def only(self, library: str, kinds: tuple[str, ...], rows: tuple[str, ...] = ("none",)) -> Plain:
        """Itself, where a library has such a model.

        Raises:
            InputError: It has not.
        """
        if self.kind not in kinds:
            raise InputError(f"{library} has no {self.kind} SAE; mmsae writes {', '.join(kinds)} for it")
        if self.rows not in rows:
            raise InputError(f"{library} takes rows as they are; the rows of this SAE are {ROWS[self.rows]}")
        return self


@torch.no_grad()
def plain(sae: SAE, library: str, modality: str | None = None) -> Plain:
    """What an SAE computes for one of its modalities, where a plain SAE can do that.

    Args:
        sae: The SAE; a copy of its weights is used.
        library: For whom, for errors.
        modality: Which one, where the SAE has several.

    Raises:
        InputError: Several modalities and none is chosen, or a part that has no plain form.
    """
    if modality is None and len(sae.modalities) > 1:
        raise InputError(
            f"this SAE has modalities {', '.join(sae.modalities)}, an SAE of {library} has one: say which (modality)"
        )
    modality = modality or sae.modalities[0]
    if modality not in sae.modalities:
        raise InputError(f"modality must be one of {', '.join(sae.modalities)}, not {modality!r}")
    encoder, dictionary = sae.encoder, sae.dictionary(modality)
    if isinstance(encoder, PerModalityEncoder):
        encoder = encoder.encoders[modality]
    atoms = dictionary.rows().detach().float().cpu().clone()
    bias = atoms.new_zeros(atoms.shape[1]) if dictionary.bias is None else dictionary.bias.float().cpu().clone()
    tensors = {"W_dec": atoms, "b_dec": bias}
    if type(encoder) is PursuitEncoder and encoder.kind == "mp":
        return _fold(sae, modality, Plain("matching_pursuit", tensors, encoder.steps, encoder=encoder), library)
    if type(encoder) is GatedEncoder and type(sae.selector) is ReLU:
        tensors["W_enc"] = encoder.weight.float().cpu().t().clone()
        tensors |= {n: getattr(encoder, n).float().cpu().clone() for n in ("b_gate", "b_mag", "r_mag")}
        return _fold(sae, modality, Plain("gated", tensors), library)
    if type(encoder) is not AffineEncoder:
        raise InputError(f"encoder {encoder.name!r} has no plain form: {library} cannot have this SAE")
    b_enc = atoms.new_zeros(len(atoms)) if encoder.bias is None else encoder.bias.float().cpu().clone()
    tensors |= {"W_enc": encoder.weight.float().cpu().t().clone(), "b_enc": b_enc}
    kind, k = _kind(sae, modality, library, tensors)
    return _fold(sae, modality, Plain(kind, tensors, k, encoder.subtract_decoder_bias), library)


def _kind(sae: SAE, modality: str, library: str, tensors: dict[str, Tensor]) -> tuple[str, int | None]:
    """Kind and k of the selector; thresholds become a tensor."""
    selector = sae.selector
    if type(selector) is ReLU:
        return "relu", None
    if type(selector) is GroupMax:
        return "groupmax", selector.k
    if type(selector) is TopK:
        if selector.score_name == "norm" and not bool(((tensors["W_dec"].norm(dim=1) - 1).abs() < 1e-6).all()):
            raise InputError(f"selector 'topk' ranks by atoms' norms, which are not 1: {library} has no such selector")
        return ("abstopk" if selector.signed else "topk"), selector.k
    try:
        theta = thresholds(sae, modality)
    except InputError as e:
        raise InputError(f"{library} cannot have this SAE: {e}") from e
    tensors["threshold"] = theta.float().cpu().clone()
    return "jumprelu", None


def _fold(sae: SAE, modality: str, p: Plain, library: str) -> Plain:
    """Put the mean and the factor of a normaliser into the weights."""
    n = sae.normaliser
    if n.unit_out:
        raise InputError(f"normaliser has unit_out, which is no part of a plain SAE: {library} cannot have this SAE")
    p = replace(p, rows="unit" if n.unit_in else "standardise" if n.standardise else "none")
    factor = float(getattr(n, f"factor_{modality}")) if n.scale != "none" else 1.0
    if not n.centre and factor == 1:
        return p
    mean = n.mean(modality).float().cpu() if n.centre else torch.zeros_like(p.tensors["b_dec"])
    if p.kind != "matching_pursuit":
        return p.folded(mean, factor)
    if factor != 1:
        raise InputError(f"normaliser has scale {n.scale!r}, and a pursuit is tied: {library} cannot have this SAE")
    return replace(p, tensors={**p.tensors, "b_dec": p.tensors["b_dec"] + mean})
