"""ITDA (arXiv 2505.17769): a dictionary of real activations, taken from the data in one pass instead of trained."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.kernels import sparse_decode
from mmsae.sae.dictionary import Dictionary
from mmsae.types import InputError, SAEOutput, Tokens

_BLOCK = 64  # rows that are coded again after each atom of one-at-a-time insertion


class GrowingDictionary(Dictionary):
    """Unit rows that are activations themselves, and where each came from; no gradients, no bias.

    In training an activation becomes an atom where the code of the present atoms reconstructs it with a cosine below
    ``cosine``; a pursuit (``sign="abs"``) encodes. The published threshold tau on ``(2 - 2 cos) / d`` is the cosine
    ``1 - tau d / 2``: 4e-4 at d = 768 is 0.846, and a fixed tau can be above what any cosine reaches at another width.
    The SAE's ``d_sae`` is the most atoms; rows without an atom are 0 and never chosen. So the size of checkpoints and
    of counts of usage does not change while the dictionary grows, and latents that are not there count as dead.

    The first batch is inserted one row at a time, also where others are not: published is to begin with its d most
    frequent rows, which unrelated models on one corpus then share.

    Attributes:
        weight: ``(d_sae, d)`` atoms, the first ``size`` of them in use.
        atom_index: ``(d_sae, 2)`` int64 names of atoms, -1 where there is none: a hash of the item's uid where batches
            have uids (``data.uids``), else the number of the row in the order of training, which is comparable only
            between runs over equal batches; and the token's position, 0 where there is one row an item.

    Args:
        cosine: Below which an activation becomes an atom.
        sequential: Whether an atom counts from the next row of its batch on, not from the next batch: fewer atoms, as
            near-duplicates within a batch are not added, and more time.
    """

    name = "growing"
    grows = True

    def __init__(self, cosine: float = 0.846, sequential: bool = False) -> None:
        super().__init__("unit", bias=False)
        if not 0 < cosine <= 1:
            raise InputError(f"cosine must be above 0 and at most 1, not {cosine}")
        self.cosine, self.sequential = cosine, sequential

    def config(self) -> dict[str, Any]:
        return {"cosine": self.cosine, "sequential": self.sequential}

    def check(self, sae: Any) -> None:
        if not sae.encoder.is_pursuit:
            raise InputError(f"dictionary 'growing' needs encoder 'pursuit', not {sae.encoder.name!r}: it has no atoms "
                             "when an encoder with weights starts as them")  # fmt: skip

    def build(self, d_in: int, d_sae: int) -> None:
        """Allocate rows for ``d_sae`` atoms; there is none yet."""
        self.register_buffer("weight", torch.zeros(d_sae, d_in))
        self.register_buffer("atom_index", torch.full((d_sae, 2), -1, dtype=torch.long))
        self.register_buffer("size_", torch.tensor(0))
        self.register_buffer("rows_", torch.tensor(0))  # seen in training
        self.register_parameter("bias", None)

    def cut_(self) -> None:
        used = self.weight.any(1).nonzero()
        self.size_.fill_(int(used[-1]) + 1 if len(used) else 0)

    @property
    def size(self) -> int:
        """Number of atoms."""
        return int(self.size_)

    @property
    def full(self) -> bool:
        return self.size == len(self.weight)

    def project_(self) -> None:
        """Nothing: atoms do not move."""

    @torch.no_grad()
    def grow_(self, tokens: Tokens, out: SAEOutput, modality: str, encoder: Any) -> None:
        """Take atoms from a training batch.

        Args:
            tokens: The batch.
            out: What the SAE made of the modality's rows.
            modality: Which rows.
            encoder: The pursuit.

        Raises:
            InputError: There are several processes.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if (world := torch.distributed.get_world_size()) > 1:
                raise InputError(f"a growing dictionary is built by one process, not {world}: use trainer.devices 1")
        x, first = out.target, int(self.rows_)
        self.rows_ += len(x)
        if self.full:
            return
        if not self.sequential and self.size:
            self._add(self._badly(x, out.recon).nonzero()[:, 0], x, tokens, modality, first)
            return
        for block in torch.arange(len(x), device=x.device).split(_BLOCK):
            while len(block) and self.size < len(self.weight):
                bad = self._badly(x[block], self._recon(x[block], encoder))
                if not bad.any():
                    break
                i = int(bad.long().argmax())
                self._add(block[i : i + 1], x, tokens, modality, first)
                block = block[i + 1 :]

    def _recon(self, x: Tensor, encoder: Any) -> Tensor:
        atoms = self.weight[: self.size]
        if not len(atoms):
            return torch.zeros_like(x)
        codes = encoder.pursue(x, atoms)
        return sparse_decode(codes.values, codes.indices, atoms)

    def _badly(self, x: Tensor, recon: Tensor) -> Tensor:
        return (F.cosine_similarity(x, recon, dim=1) < self.cosine) & (x.norm(dim=1) > 0)

    def _add(self, which: Tensor, x: Tensor, tokens: Tokens, modality: str, first: int) -> None:
        """Rows ``which`` of the batch, as many as there is room for."""
        lo = self.size
        which = which[: len(self.weight) - lo]
        hi = lo + len(which)
        self.weight[lo:hi] = F.normalize(x[which], dim=1)
        item = tokens.item[modality][which]
        names = first + which if tokens.uids is None else torch.tensor([_hash(tokens.uids[i]) for i in item.tolist()])
        position = None if tokens.position is None else tokens.position.get(modality)
        self.atom_index[lo:hi, 0] = names.to(self.atom_index)
        self.atom_index[lo:hi, 1] = 0 if position is None else position[which].to(self.atom_index)
        self.size_.fill_(hi)


def _hash(uid: str) -> int:
    """A non-negative 63-bit number of a sample id, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") >> 1
