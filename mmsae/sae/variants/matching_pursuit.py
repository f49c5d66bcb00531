"""Pursuits as encoders: MP-SAE (arXiv 2506.03093), its orthogonal form, and gradient pursuit (arXiv 2410.14670)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmsae.kernels.pursuit import Stop, fitted_pursuit, merge, mp_picks, mp_values, use_gram
from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import SAEEncoder
from mmsae.sae.precodes import PursuitCodes
from mmsae.types import InputError

KINDS, SIGNS = ("mp", "omp", "gp"), ("relu", "abs", "max")


class PursuitEncoder(SAEEncoder):
    """Chooses latents one after the other, by what is left of a row; has no weights but the dictionary's.

    Rows are centred by the decoder's bias. Atoms must have norm 1: on shorter ones the residual is not orthogonal to
    the atom that was chosen last. Values of ``mp`` have gradients through the chain of residuals; ``omp`` and ``gp``
    train the dictionary through decoding only (alternating minimisation). How many steps are done, and when a row
    stops, may be changed at inference (:meth:`adapt_`): the error falls with every step, and codes after more steps
    begin with those after fewer.

    Args:
        kind: ``mp``: matching pursuit; ``omp``: all coefficients are fitted anew by least squares in every step
            (non-negative ones with ``sign="relu"``); ``gp``: they are moved along their gradient.
        steps: The most steps of a row; its L0 is at most that (MP may choose an atom again).
        sign: Which correlations count: ``relu``: the largest, if positive (MP-SAE); ``abs``: the largest absolute value
            (classical; ITDA); ``max``: the largest, even if negative (overcomplete's).
        tol: A row stops after the step that brings the norm of its residual, in normalised units, below this.
        stop_on_repeat: Whether a row stops after it has chosen an atom again (SAELens's; before convergence).
        gram: Whether correlations of ``mp`` are updated by the inner products of atoms, which choose without gradients;
            ``auto``: where that is cheaper.
    """

    name = "pursuit"
    is_pursuit = True

    def __init__(
        self,
        kind: str = "mp",
        steps: int = 32,
        sign: str = "relu",
        tol: float | None = None,
        stop_on_repeat: bool = False,
        gram: bool | str = "auto",
    ) -> None:
        super().__init__()
        for field, value, allowed in (("kind", kind, KINDS), ("sign", sign, SIGNS)):
            if value not in allowed:
                raise InputError(f"{field} of a pursuit must be one of {', '.join(allowed)}, not {value!r}")
        if gram not in (True, False, "auto"):
            raise InputError(f"gram must be true, false or 'auto', not {gram!r}")
        if kind != "mp" and (stop_on_repeat or gram is True):
            raise InputError(f"stop_on_repeat and gram are of kind 'mp', not {kind!r}")
        self.kind, self.sign, self.stop_on_repeat, self.gram = kind, sign, stop_on_repeat, gram
        self.signed = sign == "abs"
        self.adapt_(steps, tol)

    def adapt_(self, steps: int, tol: float | None = None) -> None:
        """Change the most steps of a row, and the norm of the residual at which it stops before."""
        if steps < 1 or (tol is not None and tol < 0):
            raise InputError(f"a pursuit needs at least 1 step and a tol of at least 0, not {steps} and {tol}")
        self.steps, self.tol = steps, tol

    def config(self) -> dict[str, Any]:
        out = {"kind": self.kind, "steps": self.steps, "sign": self.sign, "tol": self.tol}
        return out | {"stop_on_repeat": self.stop_on_repeat, "gram": self.gram}

    def check(self, sae: Any) -> None:
        for key, dictionary in sae.dictionaries.items():
            if not dictionary.unit_rows:
                kind = f"{dictionary.name!r} with norm {dictionary.norm!r}"
                raise InputError(f"encoder 'pursuit' needs atoms of norm 1; dictionary {key!r} is {kind}")

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        """Nothing to allocate."""

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> PursuitCodes:
        atoms = dictionary.rows()
        return self.pursue(x if dictionary.bias is None else x - dictionary.bias, atoms)

    def pursue(self, x: Tensor, atoms: Tensor, limit: Tensor | None = None) -> PursuitCodes:
        """Codes of centred rows ``x (N, d)`` over unit ``atoms (F, d)``, in float32 at least.

        ``limit (N,)`` is the most latents of each row, in place of ``steps``. Where an atom has left its support, a row
        does more steps, at most d.
        """
        x, atoms = (t if t.dtype == torch.float64 else t.float() for t in (x, atoms))
        steps = self.steps
        if limit is not None:
            most = max(1, int(limit.max())) if len(limit) else 1
            steps = most if self.kind == "mp" else x.shape[1]
        stop = Stop(steps, self.tol, self.stop_on_repeat, limit)
        if self.kind != "mp":
            found = fitted_pursuit(x, atoms, stop, self.sign, self.kind)
            return PursuitCodes(found.residual, atoms, found.values, found.indices, found.steps)
        gram = self.gram
        if gram == "auto":
            gram = use_gram(len(x), len(atoms), steps, x.device)
        keep = not torch.is_grad_enabled()  # atoms that are trained are others at every step
        picks = mp_picks(x.detach(), atoms.detach(), stop, self.sign, gram, keep)
        values, residual = mp_values(x, atoms, picks)
        # what AuxK asks of the residual trains the atoms that it asks about, not the chain before it
        return PursuitCodes(residual.detach(), atoms, *merge(values, picks, len(atoms)), picks.on.sum(1))
