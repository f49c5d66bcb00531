"""What becomes of codes: the linear part of a decoder, differences of sparse codes, and top-k policies.

Spec 3.2 and 3.3. ``J(dz)`` is computed in float32 from the atoms of changed features only; biases and means cancel, the
per-row scale of a normaliser does not. The three-term form ``x - dec(z) + dec(z')`` is not used: in half precision it
is not the identity for ``z' = z``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.hosts.sites import Where
from mmsae.sae import SAE
from mmsae.sae.encoder import DistanceEncoder, PerModalityEncoder
from mmsae.sae.precodes import PreCodes
from mmsae.sae.selector import TopK
from mmsae.steering.edits.edit import Edit
from mmsae.types import Codes, InputError, RowInfo, SAEOutput

POLICIES = ("post", "pre", "budget")


def row_scale(sae: SAE, modality: str, info: RowInfo | None) -> Tensor | float:
    """``(N, 1)`` or scalar: by what the decoder multiplies ``z W``, to come to the units of x."""
    n = sae.normaliser
    scale: Tensor | float = 1.0
    if n.unit_out:
        scale = scale * info.inner.float()
    if n.scale != "none":
        scale = scale / getattr(n, f"factor_{modality}").float()
    return scale * info.outer.float() if n.unit_in or n.standardise else scale


def atoms(sae: SAE, modality: str, ids: Tensor) -> Tensor:
    """``(L, d)`` float32 atoms of some features."""
    return sae.dictionary(modality).rows()[ids].float()


def linear(sae: SAE, modality: str, dz: Tensor, ids: Tensor, info: RowInfo | None) -> Tensor:
    """``J(dz)``, ``(N, d)`` float32, for a change ``dz (N, L)`` of the features ``ids (L,)``."""
    return (dz.float() @ atoms(sae, modality, ids)) * row_scale(sae, modality, info)


def sparse_linear(sae: SAE, modality: str, change: Codes) -> Tensor:
    """``J`` of a change with k entries a row, ``(N, d)`` float32."""
    change = change._replace(values=change.values.float())
    return change.decode_with(sae.dictionary(modality).rows().float()) * row_scale(sae, modality, change.info)


def origin(sae: SAE, modality: str, x: Tensor) -> Tensor:
    """``dec(0)`` for rows ``x (N, d)``, float32: where the codes of a row count from."""
    _, info = sae.normaliser(x.to(sae.dictionary(modality).like.dtype), modality)
    bias = sae.dictionary(modality).bias
    base = x.new_zeros(len(x), x.shape[1]) if bias is None else bias.expand(len(x), -1)
    return sae.normaliser.invert(base, modality, info).float()


def difference(new: Codes, old: Codes) -> Codes:
    """``new - old`` as sparse codes; features with the same value in both are exactly 0."""
    values = torch.cat([new.values, -old.values], 1)
    indices, order = torch.cat([new.indices, old.indices], 1).sort(dim=1, stable=True)
    values = values.gather(1, order)
    twice = indices[:, :-1] == indices[:, 1:]  # in both: the two entries are neighbours now
    values = values.clone()
    second = torch.where(twice, values[:, 1:], 0)
    values[:, :-1] += second
    values[:, 1:] -= second
    return old._replace(values=values, indices=indices)


def check_policy(sae: SAE, policy: str) -> None:
    """Refuse ``pre`` and ``budget`` for encoders whose pre-codes are no activations, and unless the SAE is top-k."""
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
    if policy == "post":
        return
    encoders = sae.encoder.encoders.values() if isinstance(sae.encoder, PerModalityEncoder) else [sae.encoder]
    if any(isinstance(e, DistanceEncoder) for e in encoders):
        raise InputError(f"policy {policy!r} is not defined for distance encoders: use 'post'")
    if not isinstance(sae.selector, TopK):
        raise InputError(f"policy {policy!r} needs a top-k SAE, this one selects by {sae.selector.name}")


def reselect(pre: PreCodes, codes: Codes, edit: Edit, k: int, where: Where, signed: bool = False) -> Codes:
    """Policy ``pre``: the edit is written into the pre-codes, then the k largest are selected again.

    A large set value evicts the weakest other feature, a small one may be dropped itself (multimodal-sae, 2411.14982).
    Codes with signs are selected by absolute values.
    """
    ids = torch.tensor(edit.ids, device=codes.values.device)
    score = (lambda u, _: u.abs()) if signed else None
    most = min(k + len(ids), codes.d_sae)  # what may be selected without the edited features
    linear_, others = pre.topk(most, score)
    values, taken = pre.at(others, linear_), torch.isin(others, ids)
    own = pre.columns(ids)
    fired = codes.gather(ids)
    own = edit.apply(torch.where(fired != 0, fired, own), where, signed=True)
    both = torch.cat([values.masked_fill(taken, 0.0), own], 1)
    ranked = both.abs() if signed else both
    at = ranked.masked_fill(torch.nn.functional.pad(taken, (0, len(ids))), -torch.inf).topk(k, 1).indices
    indices, values = torch.cat([others, ids.expand(len(own), -1)], 1).gather(1, at), both.gather(1, at)
    return codes._replace(values=values if signed else values.relu(), indices=indices)


def within_budget(codes: Codes, dz: Tensor, ids: Tensor, k: int) -> Codes:
    """Policy ``budget``: a change of ``ids (L,)`` by ``dz (N, L)`` that also drops the smallest untouched features.

    At most ``k`` features fire afterwards.
    """
    before = codes.gather(ids)
    l0 = codes.l0() - (before != 0).sum(1) + (before + dz != 0).sum(1)
    free = (codes.values != 0) & ~torch.isin(codes.indices, ids)
    size = torch.where(free, codes.values.abs(), torch.inf)
    rank = size.argsort(dim=1, stable=True).argsort(dim=1)
    drop = free & (rank < (l0 - k)[:, None])
    values = torch.cat([torch.where(drop, -codes.values, 0), dz.to(codes.values)], 1)
    return codes._replace(values=values, indices=torch.cat([codes.indices, ids.expand(len(dz), -1)], 1))


def orthonormal(atoms: Tensor) -> Tensor:
    """``(r, d)`` orthonormal directions of ``atoms (L, d)``, by Gram-Schmidt in their order, without dependent ones.

    Each has a positive product with its atom, so that its sign still means more or less of the feature.
    """
    q, r = torch.linalg.qr(F.normalize(atoms.double(), dim=1).t())
    diagonal = r.diagonal()
    return (q * diagonal.sign())[:, diagonal.abs() > 1e-6].t().to(atoms.dtype)


def sample_fvu(sae: SAE, modality: str, out: SAEOutput, sample: Tensor) -> Tensor:
    """``(N,)``: share of variance that the SAE leaves unexplained in the sample of each row.

    The unit is the total variance that the normaliser was fitted with, as in the FVU loss; where it was not fitted
    (imported SAEs), the rows' squared distance from the decoder's bias.
    """
    error = (out.target - out.recon).float().square().sum(1)
    variance = sae.normaliser.variance(modality).float()
    total = variance.expand_as(error)
    if not torch.isfinite(variance):
        bias = sae.dictionary(modality).bias
        total = (out.target if bias is None else out.target - bias).float().square().sum(1)
    n = int(sample.max()) + 1 if len(sample) else 0
    sums = [t.new_zeros(n).index_add_(0, sample, t) for t in (error, total)]
    return (sums[0] / sums[1].clamp(min=1e-12))[sample]
