"""Dictionaries: the atoms that codes are decoded with."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmsae.sae.part import Part
from mmsae.types import InputError

NORMS = ("unit", "ball", "free")


class Dictionary(Part):
    """Atoms ``weight (d_sae, d)`` (rows) and a bias ``(d,)``.

    Args:
        norm: ``unit``: every atom has norm 1, kept by tangent gradients and renormalisation after each step; ``ball``:
            at most 1, by scaling longer ones down; ``free``: an ordinary affine decoder.
        bias: Whether decoding adds a bias.
    """

    name = "dictionary"
    full = True  #: Whether no more atoms are added.
    grows = False  #: Whether training adds atoms that are activations (:meth:`grow_`) instead of moving them.
    file_names: ClassVar[Mapping[str, tuple[str, bool]]] = {"weight": ("W_dec", False), "bias": ("b_dec", False)}

    from_rows: ClassVar[bool] = False  #: Whether ``fit_`` replaces the atoms, so that tied encoders start anew.

    def __init__(self, norm: str = "unit", bias: bool = True):
        super().__init__()
        if norm not in NORMS:
            raise InputError(f"dictionary norm must be one of {', '.join(NORMS)}, not {norm!r}")
        self.norm, self.use_bias = norm, bias

    def config(self) -> dict[str, Any]:
        return {"norm": self.norm, "bias": self.use_bias}

    def build(self, d_in: int, d_sae: int) -> None:
        """Allocate: random directions, or (``free``) the default of a linear layer from d_sae to d."""
        bound = d_sae**-0.5
        if self.norm != "free":
            self.weight = nn.Parameter(F.normalize(torch.randn(d_sae, d_in)))
            bias = torch.zeros(d_in)
        else:
            self.weight = nn.Parameter(torch.empty(d_sae, d_in).uniform_(-bound, bound))
            bias = torch.empty(d_in).uniform_(-bound, bound)
        if self.use_bias:
            self.bias = nn.Parameter(bias)
        else:
            self.register_parameter("bias", None)

    def rows(self) -> Tensor:
        """``(d_sae, d)`` atoms."""
        return self.weight

    @property
    def like(self) -> Tensor:
        """A tensor of the precision and on the device of the atoms; costs nothing where they are computed."""
        return next(chain(self.parameters(), self.buffers()))

    @property
    def unit_rows(self) -> bool:
        """Whether :meth:`rows` have norm 1."""
        return self.norm == "unit"

    @torch.no_grad()
    def project_(self) -> None:
        """Put the atoms back on their constraint; call after every optimiser step. Norm 0 stays 0, and no NaN.

        Atoms that are not trained stay as they are, to the bit.
        """
        if self.norm != "free" and self.weight.requires_grad:
            least = 1e-12 if self.norm == "unit" else 1.0
            self.weight.div_(self.weight.norm(dim=1, keepdim=True).clamp(min=least))

    def after_step_(self) -> None:
        """The constraint."""
        self.project_()

    @torch.no_grad()
    def remove_parallel_grad_(self) -> None:
        """Remove the gradient component along each atom; call before clipping."""
        if self.norm == "unit" and self.weight.grad is not None:
            n = len(self.weight)
            # temporaries of this size stay in the CPU's cache; larger ones cost ten times as much in page faults
            size = 256 if self.weight.device.type == "cpu" else n
            for grad, w in zip(self.weight.grad.split(size), self.weight.split(size), strict=True):
                grad.sub_((grad * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True).clamp(min=1e-24) * w)
