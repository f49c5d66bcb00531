"""SpLiCE (arXiv 2402.10376): atoms are the embeddings of words, codes a non-negative lasso, and nothing is trained.

The parts; :func:`mmsae.sae.splice` builds the SAE. A baseline for naming, since every latent has a name before anything
is looked at, and the control for whether training is needed. Correlated words make the support unstable: compare with a
second solver (:class:`mmsae.sae.PursuitEncoder`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import SAEEncoder
from mmsae.sae.precodes import PursuitCodes, most
from mmsae.types import InputError

ROWS = 512  # solved at a time


class FrozenDictionary(Dictionary):
    """Unit atoms that are given (:meth:`fill_`) and not trained, each with a name; no bias.

    Args:
        width: The most bytes of a name; longer ones are refused.
    """

    name = "frozen"

    def __init__(self, width: int = 64) -> None:
        super().__init__("unit", bias=False)
        self.width = width

    def config(self) -> dict[str, Any]:
        return {"width": self.width}

    def check(self, sae: Any) -> None:
        if not sae.encoder.is_pursuit:
            raise InputError(f"dictionary 'frozen' needs a pursuit, which reads its atoms, not {sae.encoder.name!r}")

    def build(self, d_in: int, d_sae: int) -> None:
        """Allocate; atoms have random directions until they are given."""
        self.register_buffer("weight", F.normalize(torch.randn(d_sae, d_in)))
        # one row of UTF-8 for each latent, so that names stay with their latents wherever those are cut or moved
        self.register_buffer("names_", torch.zeros(d_sae, self.width, dtype=torch.uint8))
        self.register_parameter("bias", None)

    @property
    def names(self) -> list[str]:
        """The name of every atom."""
        return [bytes(row).rstrip(b"\0").decode() for row in self.names_.tolist()]

    @torch.no_grad()
    def fill_(self, atoms: Tensor, names: Sequence[str]) -> None:
        """Take ``atoms (d_sae, d)``, brought to norm 1, and their names.

        Raises:
            InputError: Another number of atoms or names than of latents, an atom of norm 0, or a name that is too long.
        """
        if atoms.shape != self.weight.shape or len(names) != len(atoms):
            raise InputError(
                f"{tuple(atoms.shape)} atoms with {len(names)} names do not fit a frozen dictionary of "
                f"{tuple(self.weight.shape)}"
            )
        if bad := [names[i] for i in (~(atoms.norm(dim=1) > 0)).nonzero()[:, 0].tolist()]:
            raise InputError(f"the atom of {bad[0]!r} has no direction: its norm is 0 or not a number")
        written = [name.encode() for name in names]
        if long := [name for name, w in zip(names, written, strict=True) if len(w) > self.width]:
            raise InputError(f"the name {long[0]!r} has {len(long[0].encode())} bytes, more than width {self.width}")
        self.weight.copy_(F.normalize(atoms.to(self.weight), dim=1))
        rows = [list(w.ljust(self.width, b"\0")) for w in written]
        self.names_.copy_(torch.tensor(rows, dtype=torch.uint8))

    def project_(self) -> None:
        """Nothing: atoms do not move."""


class LassoEncoder(SAEEncoder):
    """Non-negative lasso over the dictionary: ``z >= 0`` that minimises ``|x - z D|^2 + penalty * sum(z)``.

    By ADMM with the published constants (sklearn's ``Lasso`` with ``alpha = penalty / (2 d)`` is the same problem). Its
    linear systems are solved in the d features and not in the latents. A row is done when neither of its two iterates
    moves by more than ``tol``; no gradients.

    Args:
        penalty: Weight of the sum of a row's code; published .25 to .35 for unit rows.
        rho: Step of ADMM.
        tol: Of a code value.
        iterations: The most of a row.
    """

    name = "lasso"
    is_pursuit = True

    def __init__(self, penalty: float = 0.3, rho: float = 5.0, tol: float = 1e-6, iterations: int = 2000) -> None:
        super().__init__()
        if penalty < 0 or rho <= 0 or tol <= 0 or iterations < 1:
            raise InputError(
                f"a lasso needs penalty >= 0, rho > 0, tol > 0 and at least 1 iteration, not {penalty}, {rho}, {tol} "
                f"and {iterations}"
            )
        self.penalty, self.rho, self.tol, self.iterations = penalty, rho, tol, iterations

    def config(self) -> dict[str, Any]:
        return {"penalty": self.penalty, "rho": self.rho, "tol": self.tol, "iterations": self.iterations}

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        """Nothing to allocate."""

    @torch.no_grad()
    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> PursuitCodes:
        atoms = dictionary.rows().detach()
        x = (x if dictionary.bias is None else x - dictionary.bias).detach()
        gram = atoms.T @ atoms + self.rho / 2 * torch.eye(atoms.shape[1], dtype=atoms.dtype, device=atoms.device)
        factor = torch.linalg.cholesky(gram)
        solved = [self._solve(part, atoms, factor) for part in x.split(ROWS)] or [(x.new_zeros(0, len(atoms)), None)]
        z, steps = torch.cat([s[0] for s in solved]), None if not len(x) else torch.cat([s[1] for s in solved])
        indices = z.topk(most(z > 0), dim=1, sorted=False).indices
        return PursuitCodes(x - z @ atoms, atoms, z.gather(1, indices), indices, steps)

    def _solve(self, x: Tensor, atoms: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, d_sae)`` codes and ``(N,)`` iterations done; rows that are done leave: none depends on another."""
        right = 2.0 * x @ atoms.T
        codes, steps = torch.zeros_like(right), torch.full((len(x),), self.iterations, device=x.device)
        rows = torch.arange(len(x), device=x.device)
        z, u = torch.zeros_like(right), torch.zeros_like(right)
        for i in range(self.iterations):
            v = right + self.rho * (z - u)
            # (2 D D' + rho I)^-1 v, by the inverse of a matrix that is as large as a row
            w = (v - torch.cholesky_solve((v @ atoms).T, factor).T @ atoms.T) / self.rho
            before, z = z, (w + u - self.penalty / self.rho).relu()
            u = u + w - z
            going = torch.maximum((w - z).abs().amax(1), (z - before).abs().amax(1)) > self.tol
            codes[rows] = z
            if not going.all():
                steps[rows[~going]] = i + 1
                rows, right, z, u = (t[going] for t in (rows, right, z, u))
                if not len(rows):
                    break
        return codes, steps
