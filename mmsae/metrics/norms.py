"""Whether codes have the norms of their inputs: what says of any SAE that it activates too much or too little.

From "Evaluating and Designing Sparse Autoencoders by Approximating Quasi-Orthogonality" (arXiv 2503.24277).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.sae import SAE


class CodeNorms(NamedTuple):
    """What :func:`code_norms` returns, ``(N,)`` each."""

    x: Tensor  #: Norms of the normalised rows: the abscissa of a ZF plot.
    code: Tensor  #: Norms of the codes, each value times the norm of its atom, the bias as one more atom: the ordinate.
    published: Tensor  #: ``abs(|x|^2 - |f|^2) / ((F - 1) |f|^2)``, the paper's lower bound of the coherence.
    #: ``abs(|x|^2 - |f|^2) / (|f|_1^2 - |f|^2)``, a larger lower bound [R]; NaN where one atom stands alone.
    tight: Tensor


def epsilon_lbo(x: Tensor, values: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
    """Two lower bounds, ``(N,)``, of the largest absolute cosine of two atoms, where x is what the code decodes to.

    ``||x|^2 - |f|^2| <= coherence * (|f|_1^2 - |f|^2) <= coherence * (F - 1) |f|^2`` for unit atoms.

    Args:
        x: ``(N,)`` norms of the rows.
        values: ``(N, k)`` values times their atoms' norms; what did not fire is 0.
        atoms: Number F of atoms, a bias among them.

    Returns:
        The paper's, with ``(F - 1) |f|^2`` below, and the larger one, with ``|f|_1^2 - |f|^2``.
    """
    values = values.double()
    square = values.square().sum(1)
    gap = (x.double().square() - square).abs()
    # of one value alone the difference is 0 but for rounding
    cross = torch.where((values != 0).sum(1) > 1, values.abs().sum(1).square() - square, 0.0)
    return gap / ((atoms - 1) * square), torch.where(cross > 0, gap / cross, torch.nan)


@torch.no_grad()
def code_norms(sae: SAE, x: Tensor, modality: str | None = None) -> CodeNorms:
    """Norms of rows and of their codes, and both forms of the bound, for raw activations ``x (N, d_in)``.

    Rows without a code have a published bound of infinity where the decoder has no bias.
    """
    m = sae._modality(modality)
    dictionary, out = sae.dictionary(m), sae({m: x})[m]
    norms = dictionary.rows().norm(dim=1)
    values = out.codes.values * (norms if out.codes.indices is None else norms[out.codes.indices])
    count = sae.d_sae
    if dictionary.bias is not None:
        values = torch.cat([values, dictionary.bias.norm().expand(len(values), 1)], 1)
        count += 1
    size = out.target.norm(dim=1)
    return CodeNorms(size, values.norm(dim=1), *epsilon_lbo(size, values, count))
