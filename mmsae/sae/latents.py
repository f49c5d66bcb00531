"""What can be done to the latents of a trained SAE: some of them kept, put in another order, matched or added.

Every function returns another SAE, frozen and in eval mode, which is saved and loaded like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.sae.encoder import AffineEncoder, PerModalityEncoder
from mmsae.sae.sae import SAE
from mmsae.sae.selector import TopK
from mmsae.sae.variants.cb_sae import ConceptTopK
from mmsae.types import InputError


def finished(new: SAE, sae: SAE) -> SAE:
    """An SAE that was made of another one, as a trained one is: with its sites, frozen and in eval mode."""
    new.d_in, new.sites, new.fresh = dict(sae.d_in), dict(sae.sites), False
    new.precision = sae.precision if new.encoder.takes_precision else None
    return new.to(next(iter(sae.dictionaries.values())).like.device).eval().requires_grad_(False)


def sized(sae: SAE, d_sae: int) -> SAE:
    """An SAE of the same parts with another number of latents, and fresh weights."""
    out = copy.deepcopy(sae)
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
        return out.build(sae.d_in, d_sae)


def latent_axes(sae: SAE) -> dict[str, list[int]]:
    """``{name in the state dict: axes}`` of every tensor that has an entry for each latent, whatever the parts are.

    Parts need not say so: an SAE with one latent more has these axes longer.
    """
    longer = sized(sae, sae.d_sae + 1).state_dict()
    axes = {
        name: [i for i, (a, b) in enumerate(zip(tensor.shape, longer[name].shape, strict=True)) if a != b]
        for name, tensor in sae.state_dict().items()
    }
    return {name: found for name, found in axes.items() if found}


@torch.no_grad()
def fill_(new: SAE, sae: SAE, ids: Tensor, but: Collection[str] = ()) -> SAE:
    """Give an SAE of the same parts the latents ``ids`` of another, and whatever else it holds ``but`` some tensors.

    Raises:
        InputError: A part has something else in the number of latents (points of an archetypal dictionary), or the
            selector goes by the places of latents.
    """
    if sae.selector.by_place:
        raise InputError(f"selector {sae.selector.name!r} goes by the places of latents: none can be moved or left out")
    axes, own = latent_axes(sae), new.state_dict()
    if len(ids) < sae.d_sae and (odd := [name for name, found in axes.items() if len(found) > 1]):
        raise InputError(f"{odd[0]} has the number of latents twice: they can change places, and none can be left out")
    for name, tensor in sae.state_dict().items():
        if name in but:
            continue
        for axis in axes.get(name, ()):
            tensor = tensor.index_select(axis, ids.to(tensor.device))
        own[name].copy_(tensor)
    for part in new.parts().values():
        part.cut_()
        part.loaded_()
    return finished(new, sae)


def select_latents(sae: SAE, ids: Sequence[int] | Tensor) -> SAE:
    """The SAE with the latents ``ids`` alone, in this order: their weights, thresholds and whatever parts keep of them.

    Raises:
        InputError: No ids, an id twice or beyond the latents, fewer latents than the selector keeps a row, or a part
            that has something else in their number.
    """
    ids = torch.as_tensor(ids, dtype=torch.long)
    if ids.dim() != 1 or not len(ids) or len(ids.unique()) != len(ids):
        raise InputError(f"ids of latents must be a list of distinct numbers, not of shape {tuple(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= sae.d_sae:
        raise InputError(f"latents are numbered 0 to {sae.d_sae - 1}, not {int(ids.min())} to {int(ids.max())}")
    return fill_(sized(sae, len(ids)), sae, ids)


def prune_latents(sae: SAE, scores: Tensor, keep: int) -> SAE:
    """The ``keep`` latents with the highest scores, in their old order (CB-SAE, arXiv 2512.10805).

    There, scores are the sum of how well a latent can be named and how well it steers, and keeping about half of the
    latents gives most of what the method gains. Judge the result on other concepts and images than the scores.

    Args:
        sae: Any SAE.
        scores: ``(d_sae,)``; NaN is below everything.
        keep: How many.

    Raises:
        InputError: Scores of another length, more latents than there are, or fewer than the selector keeps a row.
    """
    if scores.shape != (sae.d_sae,) or not 1 <= keep <= sae.d_sae:
        raise InputError(f"{tuple(scores.shape)} scores and keep {keep} do not fit {sae.d_sae} latents")
    order = scores.double().nan_to_num(nan=-torch.inf, neginf=-torch.inf).argsort(descending=True, stable=True)
    return select_latents(sae, order[:keep].sort().values)


def matching(correlation: Tensor) -> Tensor:
    """``(F,)`` int64: the column that is matched with each row of a panel, one to one, by the largest total.

    Rows and columns without a correlation (latents that never fired) are left out, and take what remains, in order: no
    dead row has a partner that an alive row wants.
    """
    from scipy.optimize import linear_sum_assignment

    panel = correlation.detach().double().cpu()
    if panel.dim() != 2 or panel.shape[0] != panel.shape[1]:
        raise InputError(f"a panel of correlations has shape (d_sae, d_sae), not {tuple(panel.shape)}")
    known = ~panel.isnan()
    rows, columns = known.any(1).nonzero()[:, 0], known.any(0).nonzero()[:, 0]
    i, j = linear_sum_assignment(panel[rows][:, columns].nan_to_num(-2.0).numpy(), maximize=True)
    match = torch.full((len(panel),), -1)
    match[rows[torch.from_numpy(i)]] = columns[torch.from_numpy(j)]
    free = torch.ones(len(panel), dtype=torch.bool)
    free[match[match >= 0]] = False
    match[match < 0] = free.nonzero()[:, 0]
    return match


@torch.no_grad()
def match_latents(sae: SAE, correlation: Tensor) -> SAE:
    """Two SAEs under one roof whose latents are matched after training, so that latent i means one thing in both.

    The latents of the second modality are put in the order of their partners (modality-specific SAEs, arXiv
    2606.29888): reconstructions stay what they are. A latent is worth comparing where its correlation is known. One to
    one, a matching cannot mend a concept that one side has split; on the generated world retrieval by matched codes is
    far below that of SAEs trained together.

    Args:
        sae: Two modalities, each with an encoder and a dictionary of its own.
        correlation: ``(d_sae, d_sae)`` latents of the first modality by those of the second, NaN where unknown; see
            :class:`mmsae.metrics.pairs.panel.CorrelationPanel`.

    Raises:
        InputError: Parts that the modalities share, or a panel of another size.
    """
    if len(sae.modalities) != 2 or not isinstance(sae.encoder, PerModalityEncoder) or "shared" in sae.dictionaries:
        raise InputError(
            f"latents are matched between two modalities that share nothing: this SAE has {list(sae.modalities)}, "
            f"encoder {sae.encoder.name!r} and dictionaries {sorted(sae.dictionaries)}"
        )
    if len(correlation) != sae.d_sae:
        raise InputError(f"a panel of {tuple(correlation.shape)} correlations does not fit {sae.d_sae} latents")
    m = sae.modalities[1]
    moved, out = select_latents(sae, matching(correlation)), copy.deepcopy(sae)
    out.encoder.encoders[m], out.dictionaries[m] = moved.encoder.encoders[m], moved.dictionaries[m]
    before, after = out.selector.state_dict(), moved.selector.state_dict()
    for name, axes in latent_axes(sae).items():
        part, _, tensor = name.partition(".")
        if part == "selector":
            if axes != [1] or len(before[tensor]) != 2:
                raise InputError(f"selector {sae.selector.name!r} has a {tensor} that the modalities share")
            before[tensor][1].copy_(after[tensor][1])
    return finished(out, sae)


def _of(rows: Tensor | Mapping[str, Tensor], key: str, shape: tuple[int, int], what: str) -> Tensor:
    """The rows for a modality or for what is shared, checked."""
    own = rows.get(key) if isinstance(rows, Mapping) else rows
    if own is None or tuple(own.shape) != shape:
        found = "none" if own is None else tuple(own.shape)
        raise InputError(f"{what} rows of concepts for {key} must have shape {shape}, not {found}")
    return own


@torch.no_grad()
def append_concepts(
    sae: SAE,
    encode: Tensor | Mapping[str, Tensor],
    decode: Tensor | Mapping[str, Tensor],
    concept_k: int = 5,
) -> SAE:
    """The SAE with latents for concepts at its end, of which every row has some beside its own (CB-SAE).

    What the SAE had codes as before. How the rows are found is left to the user: the paper (arXiv 2512.10805) trains
    them in turns for reconstruction and for agreement with a host's zero-shot labels, and its code is not available.

    Args:
        sae: An SAE with affine encoders and selector ``topk``.
        encode: ``(C, d)`` rows of ``E_cb`` on normalised inputs less the decoder's bias, for all modalities or by name;
            directions of words, say, or a linear probe's.
        decode: ``(C, d)`` atoms, likewise by dictionary; brought to norm 1 where the dictionary's atoms have that.
        concept_k: Concepts kept a row.

    Raises:
        InputError: Other parts, or rows of another shape.
    """
    each = dict(sae.encoder.encoders) if isinstance(sae.encoder, PerModalityEncoder) else {"shared": sae.encoder}
    if type(sae.selector) is not TopK or sae.selector.strict or sae.selector.signed or sae.selector.by_norm:
        raise InputError(f"concepts are appended to selector 'topk' by value, not {sae.selector.name!r}")
    if odd := [e.name for e in each.values() if not isinstance(e, AffineEncoder)]:
        raise InputError(f"concepts are appended to an affine encoder, not {odd[0]!r}")
    concepts = len(next(iter(encode.values())) if isinstance(encode, Mapping) else encode)
    wide = copy.deepcopy(sae)
    wide.selector = ConceptTopK(sae.selector.k, concepts, min(concept_k, max(concepts, 1)))
    new, axes, n = sized(wide, sae.d_sae + concepts), latent_axes(sae), sae.d_sae
    own = new.state_dict()
    for name, tensor in sae.state_dict().items():
        part = own[name]
        for axis in axes.get(name, ()):
            part = part.narrow(axis, 0, n)
        part.copy_(tensor)
    for key in each:
        part = new.encoder.encoders[key] if key in new.modalities else new.encoder
        part.weight[n:] = _of(encode, key, (concepts, part.weight.shape[1]), "encoding").to(part.weight)
        if part.bias is not None:
            part.bias[n:] = 0.0
    for key, dictionary in new.dictionaries.items():
        atoms = _of(decode, key, (concepts, dictionary.weight.shape[1]), "decoding").to(dictionary.weight)
        dictionary.weight[n:] = F.normalize(atoms, dim=1) if dictionary.unit_rows else atoms
    return finished(new, sae)
