"""Energy, modality, bridges and stability of the features of a joint image-text space (arXiv 2504.11695)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.metrics.pairs.item_codes import entries
from mmsae.types import Codes, InputError


def energy(codes: Codes) -> Tensor:
    """``(d_sae,)`` float64 mean value of each feature, ``E[z]`` (not squared, as :func:`..sparsity` has it)."""
    e = entries(codes)
    total = torch.zeros(codes.d_sae, dtype=torch.float64, device=codes.values.device)
    return total.index_add_(0, e.latent, e.value.double()) / max(1, codes.n)


def modality_share(image: Tensor, text: Tensor) -> Tensor:
    """``(d_sae,)`` share in [0, 1] of a feature's energy that images give; NaN for features without any.

    Means over the rows of each side are compared, so unequal numbers of images and texts do not matter.
    """
    return image.double() / (image.double() + text.double())


class Bridge(NamedTuple):
    """The strongest bridges between features that fire on images and features that fire on texts."""

    image: Tensor  #: ``(B,)`` int64 feature on the image side
    text: Tensor  #: ``(B,)`` int64 feature on the text side
    value: Tensor  #: ``(B,)`` float64 ``E_pairs[z_image z_text] <d_image, d_text>``, descending by absolute value
    mass: float  #: Sum of all absolute values
    off_diagonal: float  #: Share of it that lies between different features
    cross_modal: float  #: Share of it between different features of which one is an image and one a text feature


@torch.no_grad()
def bridge(
    image: Codes,
    text: Codes,
    atoms: Tensor,
    atoms_text: Tensor | None = None,
    top: int = 50,
    bound: float = 0.9,
    chunk: int = 4096,
) -> Bridge:
    """Bridge scores of N pairs; only features that fire together are ever looked at.

    Args:
        image: Codes of the images.
        text: Codes of the texts, row by row.
        atoms: ``(d_sae, d)`` dictionary; normalised here.
        atoms_text: The dictionary of texts, where it is another one.
        top: Bridges returned.
        bound: A feature is an image (text) feature where its modality share is above (below 1 minus) this.
        chunk: Rows at a time; memory is ``chunk * L0 * L0``.

    Raises:
        InputError: The sides are not paired.
    """
    if image.n != text.n or image.d_sae != text.d_sae:
        raise InputError(f"{image.n} x {image.d_sae} image codes are not paired with {text.n} x {text.d_sae} of text")
    f, parts = image.d_sae, []
    for lo in range(0, image.n, chunk):
        a, b = (entries(c.rows(slice(lo, lo + chunk))) for c in (image, text))
        # every entry of a meets all entries of b in its row: entries are in row order
        many = torch.bincount(b.row, minlength=chunk)
        start = many.cumsum(0) - many
        reps = many[a.row]
        left = torch.arange(len(a.row), device=reps.device).repeat_interleave(reps)
        within = torch.arange(len(left), device=reps.device) - (reps.cumsum(0) - reps).repeat_interleave(reps)
        right = start[a.row[left]] + within
        key, inverse = (a.latent[left] * f + b.latent[right]).unique(return_inverse=True)
        product = a.value[left].double() * b.value[right].double()
        parts.append(
            (key, torch.zeros(len(key), dtype=torch.float64, device=key.device).index_add_(0, inverse, product))
        )
    key, inverse = torch.cat([k for k, _ in parts]).unique(return_inverse=True)
    value = torch.zeros(len(key), dtype=torch.float64, device=key.device)
    value.index_add_(0, inverse, torch.cat([v for _, v in parts]))
    i, j = key // f, key % f
    d = normalize(atoms.double(), dim=1)
    e = d if atoms_text is None else normalize(atoms_text.double(), dim=1)
    cosine = torch.cat([(d[a] * e[b]).sum(1) for a, b in zip(i.split(65536), j.split(65536), strict=True)])
    value = value / image.n * cosine
    mass, off = value.abs().sum(), i != j
    share = modality_share(energy(image), energy(text))
    kind = (share > bound).long() - (share < 1 - bound).long()
    cross = off & (kind[i] * kind[j] == -1)
    best = value.abs().argsort(descending=True, stable=True)[:top]
    of = [(value[m].abs().sum() / mass).item() for m in (off, cross)]
    return Bridge(i[best], j[best], value[best], mass.item(), *of)


@torch.no_grad()
def stability(atoms: Tensor, other: Tensor, weight: Tensor | None = None) -> dict[str, float]:
    """How well the atoms of two dictionaries match one to one: mean cosine under the best permutation (Hungarian).

    Args:
        atoms: ``(F, d)``.
        other: ``(F', d)``; the larger dictionary keeps atoms unmatched.
        weight: ``(F,)`` energies of ``atoms``; adds ``energy_weighted``.

    Returns:
        ``stability``; ``nearest``: mean cosine with the nearest atom of ``other``, which need not be one to one. Read
        them beside those of random atoms of the same sizes, which are not 0: about .27 for 80 atoms in 64 dimensions.

    Raises:
        InputError: Different widths.
    """
    from scipy.optimize import linear_sum_assignment

    if atoms.shape[1] != other.shape[1]:
        raise InputError(f"dictionaries have widths {atoms.shape[1]} and {other.shape[1]}: nothing to match")
    cos = (normalize(atoms.double(), dim=1) @ normalize(other.double(), dim=1).T).cpu()
    row, col = (torch.from_numpy(i) for i in linear_sum_assignment(cos.numpy(), maximize=True))
    matched = cos[row, col]
    out = {"stability": matched.mean().item(), "nearest": cos.amax(1).mean().item()}
    if weight is not None:
        w = weight.double().cpu()[row]
        out["energy_weighted"] = ((matched * w).sum() / w.sum()).item()
    return out
