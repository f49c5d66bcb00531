"""What is done to an SAE after its training: every function returns a new one, frozen and in eval mode.

The given SAE stays as it is. Results are SAEs like any other: they are saved, loaded, attached and measured alike.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import PerModalityEncoder, SAEEncoder
from mmsae.sae.latents import fill_, finished
from mmsae.sae.registry import make_part, part_config
from mmsae.sae.sae import SAE
from mmsae.sae.selector import Pursued, Ranked, ReLU, Selector, TopK
from mmsae.sae.thresholds import thresholds
from mmsae.sae.variants.afa import EnergyTopK
from mmsae.sae.variants.batch_topk import Thresholded
from mmsae.sae.variants.gba import ScaledDictionary
from mmsae.sae.variants.gradient import GradientTopK
from mmsae.sae.variants.jumprelu import JumpReLU
from mmsae.sae.variants.matching_pursuit import PursuitEncoder
from mmsae.sae.variants.pursuit_at_l0 import PursuitAtL0
from mmsae.types import InputError

CHUNK = 8192  # rows coded at a time


def _composed(sae: SAE, **parts: SAEEncoder | Selector | dict[str, Dictionary]) -> SAE:
    """An SAE of built parts: those given, and copies of the others."""
    slots = {"normaliser": sae.normaliser, "encoder": sae.encoder, "selector": sae.selector}
    own = {name: parts.get(name) or copy.deepcopy(part) for name, part in slots.items()}
    own["dictionaries"] = parts.get("dictionaries") or {k: copy.deepcopy(d) for k, d in sae.dictionaries.items()}
    new = SAE(d_sae=sae.d_sae, modalities=sae.modalities, **own)
    return finished(new, sae)


def _norms(dictionary: Dictionary) -> Tensor:
    """``(d_sae,)`` norms of atoms, 1 for those of norm 0, which stay as they are."""
    norms = dictionary.rows().detach().norm(dim=1)
    return torch.where(norms > 0, norms, 1.0)


def _plain(dictionary: Dictionary, rows: Tensor, norm: str) -> Dictionary:
    """A dictionary with these atoms and the bias of another."""
    new = Dictionary(norm, dictionary.bias is not None)
    new.weight = nn.Parameter(rows.detach().clone())
    bias = dictionary.bias
    new.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
    return new


def _unit(dictionary: Dictionary) -> Dictionary:
    return _plain(dictionary, dictionary.rows() / _norms(dictionary)[:, None], "unit")


def _jumprelu(sae: SAE, theta: Mapping[str, Tensor]) -> JumpReLU:
    """A built selector with ``{modality: (d_sae,) threshold}``, of one row where all modalities have the same."""
    first, *others = theta.values()
    new = JumpReLU(log=False, per_modality=not all(torch.equal(first, other) for other in others))
    new.build(sae.d_sae, sae.modalities)
    new.thresholds = nn.Parameter(torch.stack(list(theta.values())) if new.per_modality else first[None].clone())
    return new


# Selection.


@torch.no_grad()
def by_thresholds(sae: SAE, theta: Mapping[str, Tensor]) -> SAE:
    """The same SAE with selector ``jumprelu`` at ``{modality: (d_sae,) threshold of pre-codes}``; infinite: never."""
    return _composed(sae, selector=_jumprelu(sae, theta))


@torch.no_grad()
def to_jumprelu(sae: SAE, rows: Mapping[str, Tensor] | None = None) -> SAE:
    """The same SAE by constant thresholds: selector ``jumprelu`` in place of one that has learned running thresholds.

    That is BatchTopK, Feature Choice, and ReLU, whose threshold is 0. Codes of evaluation are equal bit for bit. A
    modality has thresholds of its own where they differ.

    TopK has no threshold, and keeps k latents of a row that needs fewer. Given rows, its threshold is the mean of the
    smallest value that each of them keeps: a row then has as many latents as are above it, and codes are others.

    Args:
        sae: A trained SAE.
        rows: ``{modality: (N, d) raw activations}`` of every modality, for TopK: what it was trained on will do. Other
            selectors do not read them.

    Raises:
        InputError: A selector without thresholds, or one that compares absolute values; or TopK and a modality without
            rows, or whose rows keep nothing.
    """
    selector = sae.selector
    if isinstance(selector, JumpReLU):
        return _composed(sae)
    if isinstance(selector, ReLU):
        theta = {m: sae.dictionary(m).like.new_zeros(sae.d_sae) for m in sae.modalities}
    elif rows is not None and type(selector) is TopK and selector.score_name == "value":
        if missing := [m for m in sae.modalities if not len(rows.get(m, ()))]:
            raise InputError(f"no {missing[0]} rows to learn the threshold of TopK from")
        theta = {m: _mean_smallest(sae, rows[m], m).expand(sae.d_sae) for m in sae.modalities}
    else:
        theta = {m: thresholds(sae, m) for m in sae.modalities}
    return by_thresholds(sae, theta)


def _mean_smallest(sae: SAE, x: Tensor, modality: str) -> Tensor:
    """The mean over rows of the smallest positive pre-code among the k largest."""
    least = []
    for part in x.split(CHUNK):
        pre = sae._pre(part.to(sae.dictionary(modality).like.device), modality)[0]
        kept = pre.dense().topk(sae.selector.k, dim=1).values
        least.append(torch.where(kept > 0, kept, torch.inf).min(1).values)
    smallest = torch.cat(least)
    smallest = smallest[smallest.isfinite()]
    if not len(smallest):
        raise InputError(f"TopK keeps nothing of the {len(x):,} {modality} rows that its threshold is learned from")
    return smallest.mean()


@torch.no_grad()
def fold_decoder_norm(sae: SAE) -> SAE:
    """The same reconstructions with atoms of norm 1: their norms become a part of the code.

    ``W_enc``, ``b_enc`` (a gated encoder's biases) and thresholds are multiplied by the norms, so that a code value
    says how much its latent adds to the reconstruction. Where dictionaries of modalities have other norms, a shared
    encoder becomes one for each modality. Atoms of norm 0 and their latents stay as they are.

    Raises:
        InputError: The selector ranks pre-codes (``score`` value or abs), so that it would choose others. Or the
            encoder has no weights to fold norms into.
    """
    norms = {m: _norms(sae.dictionary(m)) for m in sae.modalities}
    if all(torch.allclose(n, torch.ones_like(n), rtol=0, atol=1e-6) for n in norms.values()):
        return _composed(sae)
    selector = copy.deepcopy(sae.selector)
    if not (isinstance(selector, (ReLU, JumpReLU)) or selector.by_norm):
        score = f" (score {selector.score_name!r})" if isinstance(selector, Ranked) else ""
        raise InputError(
            f"selector {selector.name!r}{score} chooses by pre-codes, which norms of atoms would change: only relu, "
            "jumprelu and score 'norm' choose alike with the norms folded in"
        )
    if isinstance(selector, JumpReLU):
        selector = _jumprelu(sae, {m: selector.threshold(m) * n for m, n in norms.items()})
    dictionaries = {key: _unit(d) for key, d in sae.dictionaries.items()}
    return _composed(sae, encoder=_scaled(sae.encoder, norms), selector=selector, dictionaries=dictionaries)


def _scaled(encoder: SAEEncoder, norms: Mapping[str, Tensor]) -> SAEEncoder:
    """An encoder whose pre-codes are ``{modality: (d_sae,) factor}`` times another's."""
    new, (first, *others) = copy.deepcopy(encoder), norms.values()
    if isinstance(new, PerModalityEncoder):
        for m, part in new.encoders.items():
            part.scale_(norms[m])
    elif all(torch.equal(first, n) for n in others):
        new.scale_(first)
    else:
        new = PerModalityEncoder(make_part("encoder", part_config(encoder)))
        for m, n in norms.items():
            new.encoders[m] = copy.deepcopy(encoder)
            new.encoders[m].scale_(n)
    return new


# Encoders.


@torch.no_grad()
def with_pursuit(sae: SAE, kind: str = "gp", l0: str | int = "model") -> SAE:
    """The dictionary of an SAE with a pursuit in place of its encoder (inference-time optimisation, arXiv 2410.14670).

    What is left of a row then says more of the dictionary and less of the encoder; a greedy choice can still be worse
    than a trained encoder's. Signed codes stay signed. Atoms are brought to norm 1.

    Args:
        sae: A trained SAE.
        kind: ``mp``, ``omp`` or ``gp``; see :class:`mmsae.sae.PursuitEncoder`.
        l0: ``model``: each row has at most as many latents as its own code has, which the SAE's encoder goes on to
            say; or a number for all rows.

    Raises:
        InputError: An unknown ``kind`` or ``l0``.
    """
    if not (l0 == "model" or (isinstance(l0, int) and l0 >= 1)):
        raise InputError(f"l0 must be 'model' or a number of latents of at least 1, not {l0!r}")
    sign = "abs" if sae.signed else "relu"
    if l0 == "model":
        if sae.selector.by_norm:
            sae = fold_decoder_norm(sae)  # so that bringing atoms to norm 1 does not change what is chosen
        encoder = PursuitAtL0(copy.deepcopy(sae.encoder), copy.deepcopy(sae.selector), kind, sign)
    else:
        encoder = PursuitEncoder(kind, l0, sign)
    dictionaries = {k: copy.deepcopy(d) if d.unit_rows else _unit(d) for k, d in sae.dictionaries.items()}
    return _composed(sae, encoder=encoder, selector=Pursued(), dictionaries=dictionaries)


# Sizes and scales.


@torch.no_grad()
def truncate(sae: SAE, prefix: int) -> SAE:
    """The first ``prefix`` latents alone, as a Matryoshka SAE is cut.

    With thresholds (also after :func:`to_jumprelu`) codes are the first columns of the whole SAE's. A selector that
    counts latents of a row (TopK) counts among those that are left: more of them are on than in the whole code, and k
    is lowered where it does not fit.

    Raises:
        InputError: ``prefix`` is not between 1 and the SAE's number of latents, or a part has something else in their
            number.
    """
    if not 1 <= prefix <= sae.d_sae:
        raise InputError(f"prefix must lie between 1 and d_sae = {sae.d_sae}, not {prefix}")
    selector = part_config(sae.selector)
    if "k" in selector:
        selector["k"] = min(selector["k"], prefix - bool(selector.get("strict")))
    new = SAE(
        d_sae=prefix,
        modalities=sae.modalities,
        normaliser=make_part("normaliser", part_config(sae.normaliser)),
        encoder=make_part("encoder", part_config(sae.encoder)),
        selector=make_part("selector", selector),
        dictionaries={k: make_part("dictionary", part_config(d)) for k, d in sae.dictionaries.items()},
    )
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: nothing is drawn
        new.build(sae.d_in)
    return fill_(new, sae, torch.arange(prefix), but=("selector.k_",))


@torch.no_grad()
def calibrate_scale(sae: SAE, rows: Mapping[str, Tensor]) -> SAE:
    """The best scale of the reconstructions about the bias, folded into the atoms; codes stay what they are.

    Penalties and thresholds make codes too small (shrinkage), so that part of the error is the activation itself. One
    number for every dictionary mends what one number can: it minimises the FVU of ``rows``, for a shared dictionary
    the mean FVU over modalities.

    Args:
        sae: A trained SAE.
        rows: ``{modality: (N, d) raw activations}`` of every modality, other than those that are evaluated.

    Raises:
        InputError: A pursuit, an energy budget or a ranking by gradients, whose codes would change with the atoms; a
            modality without rows; or reconstructions whose best scale is not above 0.
    """
    if isinstance(sae.selector, (EnergyTopK, GradientTopK)):
        raise InputError(f"selector {sae.selector.name!r} goes by the length of atoms: codes would change with it")
    if sae.encoder.is_pursuit:
        raise InputError(f"encoder {sae.encoder.name!r} reads the atoms, whose norm must stay 1: it fits scales itself")
    if missing := [m for m in sae.modalities if not len(rows.get(m, ()))]:
        raise InputError(f"no {missing[0]} rows to fit the scale on")
    factor = {}
    for key in sae.dictionaries:
        sums = [_projection(sae, rows[m], m) for m in sae.modalities if key in ("shared", m)]
        above, below = (sum(s) for s in zip(*sums, strict=True))
        factor[key] = float(above / below) if below > 0 else 0.0
        if not factor[key] > 0:
            raise InputError(f"the best scale of dictionary {key!r} is {factor[key]:.3g}: is this SAE trained?")
    selector = copy.deepcopy(sae.selector)
    if isinstance(selector, Thresholded) and selector.by_norm:
        for i, m in enumerate(sae.modalities):
            selector.sum_[i] *= factor["shared" if "shared" in factor else m]
    dictionaries = {key: _longer(d, factor[key]) for key, d in sae.dictionaries.items()}
    return _composed(sae, selector=selector, dictionaries=dictionaries)


def _longer(dictionary: Dictionary, factor: float) -> Dictionary:
    if isinstance(dictionary, ScaledDictionary):  # the encoder reads its unit rows
        dictionary = copy.deepcopy(dictionary)
        dictionary.scale.mul_(factor)
        return dictionary
    return _plain(dictionary, dictionary.rows() * factor, "free")


def _projection(sae: SAE, x: Tensor, modality: str) -> tuple[Tensor, Tensor]:
    """``<x - x_0, x_hat - x_0>`` and ``|x_hat - x_0|^2`` over the total variance; ``x_0`` is decoded of empty codes."""
    above = below = square = torch.zeros((), dtype=torch.float64)
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for part in x.split(CHUNK):
        codes = sae.encode(part, modality)
        empty = sae.decode(codes._replace(values=torch.zeros_like(codes.values)), modality).double().cpu()
        moved, part = sae.decode(codes, modality).double().cpu() - empty, part.double().cpu()
        above, below = above + ((part - empty) * moved).sum(), below + moved.square().sum()
        total, square = total + part.sum(0), square + part.square().sum()
    variance = square - total.square().sum() / len(x)
    return above / variance, below / variance
