"""vSAE (arXiv 2509.22994): codes with Gaussian posteriors, and a KL term that pulls them to N(0, 1).

A negative result that is worth being able to reproduce: worse than TopK on most measures, with many more dead latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import AffineEncoder
from mmsae.sae.losses import LossContext, LossTerm, Outputs
from mmsae.sae.precodes import DensePreCodes, PreCodes
from mmsae.types import InputError

LOG_VARIANCE = (-6.0, 2.0)  # bounds, as published
LARGEST_MEAN = 10.0  # that the KL term sees, as published


class GaussianEncoder(AffineEncoder):
    """``xi = mean + sigma * noise`` in training, ``mean`` after it; for selectors that rank ``|xi|`` (score ``abs``).

    ``mean = [affine]+`` and, where the variance is learned, ``log sigma^2 = x W.T + b`` within [-6, 2], which starts
    near -2. With a fixed variance there is no noise: the KL term is then a penalty on squared means, and the method is
    TopK with that penalty. Noise depends on the weights' seed, the number of forward passes in training and the rank;
    both numbers are stored, so that a resumed training draws what it would have drawn.

    Args:
        learned_variance: Whether the variance is learned; else it is fixed at 1, and nothing is drawn.
        sample: ``before`` the selection, as published: latents of mean 0 may be chosen for their noise, which needs a
            mean above 2.16 to be beaten for k = 64 of 2,048 at sigma 1; or ``after`` it: means are ranked, and what is
            chosen is sampled.
        rectified: Whether means are ReLU'd, as the published code does against its description.
        bias: Whether there is a ``b_enc``.
        subtract_decoder_bias: Whether the decoder's bias is taken off the input first.
    """

    name = "gaussian"
    takes_precision = False
    file_names: ClassVar[Mapping[str, tuple[str, bool]]] = AffineEncoder.file_names | {
        "spread": ("W_enc_log_variance", True),
        "spread_bias": ("b_enc_log_variance", False),
    }

    def __init__(
        self,
        learned_variance: bool = True,
        sample: str = "before",
        rectified: bool = True,
        bias: bool = True,
        subtract_decoder_bias: bool = True,
    ) -> None:
        super().__init__(bias, subtract_decoder_bias)
        if sample not in ("before", "after"):
            raise InputError(f"sample must be 'before' or 'after' the selection, not {sample!r}")
        self.learned_variance, self.sample, self.rectified = learned_variance, sample, rectified

    def config(self) -> dict[str, Any]:
        own = {"learned_variance": self.learned_variance, "sample": self.sample, "rectified": self.rectified}
        return own | super().config()

    def build(self, d_in: Mapping[str, int], d_sae: int, dictionaries: Mapping[str, Dictionary]) -> None:
        super().build(d_in, d_sae, dictionaries)
        if self.learned_variance:
            self.spread = nn.Parameter(nn.init.kaiming_uniform_(torch.empty_like(self.weight)))
            self.spread_bias = nn.Parameter(torch.full((d_sae,), -2.0))
            self.register_buffer("noise_", torch.cat([torch.randint(2**31, (1,)), torch.tensor([0])]))  # seed, passes
            self.loaded_()

    def loaded_(self) -> None:
        self._read: list[int] | None = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.loaded_()

    def _noise(self, like: Tensor) -> Tensor:
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if ranks else 0
        if self._read is None:  # a copy on the host: only the first pass waits for the device
            self._read = self.noise_.tolist()
        seed = (self._read[0] * 1_000_003 + self._read[1]) * 1_009 + rank
        self._read[1] += 1
        self.noise_[1].fill_(self._read[1])
        generator = torch.Generator(like.device).manual_seed(seed % 2**63)
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor, dictionary: Dictionary, modality: str) -> DensePreCodes:
        affine = super().forward(x, dictionary, modality)
        mean = affine.dense().relu() if self.rectified else affine.dense()
        xi, log_variance = mean, None
        if self.learned_variance:
            spread = PreCodes(affine.x, self.spread, self.spread_bias, precision="fp32", centre=affine.centre)
            log_variance = spread.dense().clamp(*LOG_VARIANCE)
            if self.training:
                xi = mean + (0.5 * log_variance).exp() * self._noise(mean)
        extras = {"mean": mean, "log_variance": log_variance}
        return DensePreCodes(xi if self.sample == "before" else mean, xi, extras)


def kl_to_normal(mean: Tensor, log_variance: Tensor | None = None) -> Tensor:
    """``KL(N(mean, variance) || N(0, 1))`` of each entry; None: variance 1."""
    square = mean.square()
    return 0.5 * (square if log_variance is None else square + log_variance.exp() - 1.0 - log_variance)


class KLGaussian(LossTerm):
    """``coefficient * ramp * E_rows sum_i KL(N(mean_i, sigma_i^2) || N(0, 1))``, mean over modalities.

    The sum is over latents, so the coefficient must fall as ``1 / d_sae`` where the width grows; the published 1 stands
    beside squared errors that are summed over features, and is ``1 / variance`` here.

    Args:
        coefficient: Weight of the term, in FVU units.
        mask: ``all`` latents, as published, which pulls those that were not selected to mean 0 and sigma 1, too; or
            the ``selected`` ones of each row.
        ramp: Share of the training over which the coefficient rises linearly from 0.
    """

    name = "kl_gaussian"

    def __init__(self, coefficient: float = 1e-3, mask: str = "all", ramp: float = 0.1) -> None:
        super().__init__()
        if mask not in ("all", "selected"):
            raise InputError(f"mask must be 'all' or 'selected', not {mask!r}")
        self.coefficient, self.mask, self.ramp = coefficient, mask, ramp

    def check(self, sae: Any) -> None:
        super().check(sae)
        encoder = getattr(sae.encoder, "template", [sae.encoder])[0]
        if not isinstance(encoder, GaussianEncoder):
            raise InputError(f"kl_gaussian needs means of encoder 'gaussian', this SAE's encoder is {encoder.name!r}")

    def forward(self, outputs: Outputs, ctx: LossContext) -> Tensor:
        total = 0.0
        for out in outputs.values():
            mean, log_variance = out.pre.extras["mean"], out.pre.extras["log_variance"]
            kl = kl_to_normal(mean.clamp(-LARGEST_MEAN, LARGEST_MEAN), log_variance)
            if self.mask == "selected":
                indices = out.codes.indices
                kl = kl * (out.codes.values != 0) if indices is None else kl.gather(1, indices)
            total = total + kl.sum(1).mean()
        return self.coefficient * ctx.ramp(self.ramp) * total / len(outputs)
