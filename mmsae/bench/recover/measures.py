"""How much of a known dictionary, and of known codes, an SAE has found."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.bench.recover.worlds import KnownWorld
from mmsae.metrics.error_decomposition import predictable_share
from mmsae.metrics.reconstruction import fvu
from mmsae.sae import SAE


def match(found: Tensor, true: Tensor, signed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """One-to-one assignment of atoms to true ones, by the Hungarian method on cosines.

    Args:
        found: ``(m, d)`` atoms of an SAE.
        true: ``(n, d)`` true atoms.
        signed: Whether an atom may stand for a true one with the other sign.

    Returns:
        ``(rows, columns, cosine)``: pairs of an atom and a true one, ``min(m, n)`` of them, and their cosines (absolute
        ones where ``signed``).
    """
    from scipy.optimize import linear_sum_assignment

    cosine = normalize(found.double()) @ normalize(true.double()).t()
    cosine = cosine.abs() if signed else cosine
    rows, columns = (torch.from_numpy(i) for i in linear_sum_assignment(-cosine.cpu().numpy()))
    return rows, columns, cosine[rows, columns]


@torch.no_grad()
def recovery(sae: SAE, world: KnownWorld, x: Mapping[str, Tensor], codes: Tensor) -> dict[str, float]:
    """Figures of an SAE on rows of its world that it was not trained on, means over modalities.

    ``x {modality: (N, d)}`` are the rows, ``codes (N, atoms)`` the true ones.

    Returns:
        ``cosine``: mean matched cosine, true atoms without a partner count 0; ``found``: share of true atoms with a
        partner above .9; ``precision`` and ``recall`` of the events "true atom is on", by matched latents (an unmatched
        latent that fires is a false one); ``fvu``; ``l0``; ``dead``: share of latents that fire on none of the rows;
        ``predictable``: share of the error's variance that a linear map of the rows predicts, fitted on every other
        row; ``ce`` and ``ce_raw`` where a classifier reads the rows: its loss on reconstructions and on the rows
        themselves; ``absorption`` where the world has a hierarchy: mean over children of the share of their rows on
        which the parent's latent is silent.
    """
    on = codes != 0
    each: dict[str, list[float]] = {}
    for m in sae.modalities:
        z = sae.encode(x[m], m)
        fired = (z.to_dense() != 0).cpu()
        atoms = sae.dictionary(m).rows().detach().cpu()
        latents, columns, cosine = match(atoms, world.atoms[m], sae.signed or world.signed)
        hits = (fired[:, latents] & on[:, columns]).sum()
        own = {
            "cosine": float(cosine.sum() / world.size),
            "found": float((cosine > 0.9).sum() / world.size),
            "precision": float(hits / fired.sum().clamp(min=1)),
            "recall": float(hits / on.sum()),
            "fvu": fvu(sae.decode(z, m), x[m]),
            "l0": float(fired.sum(1).double().mean()),
            "dead": float((~fired.any(0)).double().mean()),
            "predictable": predictable_share(sae, x[m][::2], x[m][1::2], m),
        }
        if world.head is not None:
            own["ce"] = float(world.loss(sae.decode(z, m), codes).mean())
            own["ce_raw"] = float(world.loss(x[m], codes).mean())
        if world.parents is not None:
            own["absorption"] = _absorption(fired, on, world.parents, latents, columns)
        for name, value in own.items():
            each.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in each.items()}


def _absorption(fired: Tensor, on: Tensor, parents: Tensor, latents: Tensor, columns: Tensor) -> float:
    """Mean over children: how often the parent's matched latent is silent where the child, and so the parent, is on."""
    latent = torch.full((len(parents),), -1)
    latent[columns] = latents
    silent = []
    for child in (parents >= 0).nonzero()[:, 0].tolist():
        parent = int(latent[parents[child]])
        rows = on[:, child]
        silent.append(1.0 if parent < 0 else float((~fired[rows, parent]).double().mean()))
    return float(np.mean(silent))
