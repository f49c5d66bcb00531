"""How much of a host's zero-shot classification survives when its embeddings are replaced by reconstructions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, normalize


class ZeroShotRecovered(NamedTuple):
    """Cross-entropies in nats per image, and what is recovered of them."""

    clean: float  #: Cross-entropy of the host
    reconstructed: float  #: With reconstructions
    zero: float  #: With zeros, ``ln C``
    mean: float  #: With the mean embedding in place of every one
    #: ``(zero - reconstructed) / (zero - clean)``; 1 is the host, 0 as bad as zeros. NaN where the host itself is no
    #: better than zeros (an overconfident one): there is nothing to recover.
    recovered_zero: float
    recovered_mean: float  #: The same against the mean
    recovered_kl: float  #: ``1 - KL(clean, reconstructed) / KL(clean, mean)``
    top1_clean: float  #: Accuracy of the host
    top1_reconstructed: float  #: Accuracy with reconstructions
    agreement: float  #: Share of images whose class is the host's, right or wrong
    images: int  #: Number of images


@torch.no_grad()
def zero_shot_recovered(
    x: Tensor, x_hat: Tensor, classes: Tensor, labels: Tensor, logit_scale: float
) -> ZeroShotRecovered:
    """Loss recovered of zero-shot classification.

    The logits are the host's own: unit vectors times its logit scale. Without that scale every cross-entropy is close
    to ``ln C`` and the ratios are noise. ``x (N, d)`` are image embeddings, ``x_hat`` their reconstructions, ``classes
    (C, d)`` class embeddings, ``labels (N,)`` int64.
    """
    w = normalize(classes.double(), dim=1).T * logit_scale

    def logits(v: Tensor) -> Tensor:
        return normalize(v.double(), dim=1) @ w  # a zero vector stays zero: all logits 0

    sides = (x, x_hat, torch.zeros_like(x[:1]), x.double().mean(0, keepdim=True))
    out = [logits(v).expand(len(x), -1) for v in sides]
    clean, rec, zero, mean = (cross_entropy(v, labels).item() for v in out)
    logp = [v.log_softmax(1) for v in out]
    kl = [kl_div(q, logp[0], reduction="batchmean", log_target=True).item() for q in (logp[1], logp[3])]
    best = [v.argmax(1) for v in out[:2]]
    return ZeroShotRecovered(
        clean, rec, zero, mean,
        (zero - rec) / (zero - clean) if zero > clean else float("nan"),
        (mean - rec) / (mean - clean) if mean > clean else float("nan"),
        1 - kl[0] / kl[1] if kl[1] else float("nan"),
        (best[0] == labels).double().mean().item(),
        (best[1] == labels).double().mean().item(),
        (best[0] == best[1]).double().mean().item(),
        len(x),
    )  # fmt: skip
