"""SPARC (arXiv 2507.06265): streams with encoders and dictionaries of their own choose their latents together.

Two things tie the streams: in training one set of latents for all of them, and that each code has to reconstruct the
other streams too. The first alone makes supports equal, by construction, and not their meanings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmsae.sae.losses import LossContext, Outputs, Reconstruction
from mmsae.sae.part import refuse_unpaired
from mmsae.sae.selector import AnyPreCodes, SelectContext, Selected, TopK
from mmsae.types import Codes, InputError


class JointTopK(TopK):
    """TopK that in training chooses the k latents with the largest sum of scores over the streams of an item.

    Every stream keeps its own pre-codes there, ReLU'd, so that L0 may be below k. In evaluation each stream chooses for
    itself: codes that were chosen together are alike whatever they mean, and a pair's two codes are to be compared.
    Streams must have one scale, or the largest chooses for all: normalise them.

    Args:
        k: Latents kept a row.
        score: What is summed; see :class:`mmsae.sae.TopK`.
    """

    name = "joint_topk"

    def __init__(self, k: int = 32, score: str = "value") -> None:
        super().__init__(k, score=score)

    def config(self) -> dict[str, Any]:
        own = super().config()
        del own["strict"]
        return own

    def check(self, sae: Any) -> None:
        if len(sae.modalities) < 2:
            raise InputError(
                f"selector 'joint_topk' chooses for several streams: it needs two modalities, not "
                f"{list(sae.modalities)}"
            )

    def select(self, pres: Mapping[str, AnyPreCodes], rows: Mapping[str, SelectContext]) -> dict[str, Selected]:
        """The codes of a batch; in training of tuples only.

        Raises:
            InputError: In training, one modality alone or unequal counts.
        """
        if not self.training:
            return super().select(pres, rows)
        refuse_unpaired(f"selector {self.name!r} in training", {m: len(r.target) for m, r in rows.items()}, two=False)
        scores = {m: self.score(r) for m, r in rows.items()}
        first, *others = pres

        def joint(u: Tensor, which: slice) -> Tensor:
            parts = [(first, u), *((m, pres[m].rows(which).dense()) for m in others)]
            return sum(v if scores[m] is None else scores[m](v, which) for m, v in parts)

        linear, indices = pres[first].topk(self.k, joint)
        return {m: (self.keep(pre, indices, linear if m == first else None), indices) for m, pre in pres.items()}


def decode_as(codes: Codes, modality: str, ctx: LossContext, train: bool = True) -> Tensor:
    """``(N, d)`` decoding of codes by a modality's dictionary, in normalised units; not ``train``: as a constant."""
    dictionary = ctx.sae.dictionary(modality)
    atoms, bias = dictionary.rows(), dictionary.bias
    if not train:
        atoms, bias = atoms.detach(), None if bias is None else bias.detach()
    recon = codes.decode_with(atoms)
    return recon if bias is None else recon + bias


class CrossReconstruction(Reconstruction):
    """``coefficient * sum over streams s, t != s of error(x_t, decoding of z_s by t's dictionary)``.

    Beside ``Reconstruction``, which has the streams' own errors. Where one modality says little of the other (ten class
    names and many images), it spends latents on means.

    Args:
        coefficient: Weight of the term.
        reduction: Unit of each error; see :class:`Reconstruction`.
    """

    name = "cross_reconstruction"
    least_modalities = 2

    def __init__(self, coefficient: float = 1.0, reduction: str = "fvu") -> None:
        super().__init__(reduction)
        self.coefficient = coefficient

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        """Scalar loss of pairs, or of tuples of more modalities.

        Raises:
            InputError: One modality alone, or unequal counts.
        """
        refuse_unpaired(self.name, {m: out.codes.n for m, out in outputs.items()}, two=False)
        return self.coefficient * sum(
            self.error(out.target, decode_as(other.codes, m, ctx), m, ctx)
            for m, out in outputs.items()
            for n, other in outputs.items()
            if n != m
        )
