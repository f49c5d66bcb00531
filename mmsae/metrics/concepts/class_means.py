"""Mean features of classes from a stream, and the accuracy of the nearest of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric

from mmsae.types import Codes


def as_codes(features: Tensor | Codes) -> Codes:
    """Features ``(N, F)`` as dense codes; codes as they are."""
    return features if isinstance(features, Codes) else Codes(features, None, features.shape[1])


class ClassMeans(Metric):
    """Sums of features per class in float64, added over ranks."""

    full_state_update = False

    def __init__(self, classes: int, features: int, **kwargs):
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(classes, features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, features: Tensor | Codes, labels: Tensor) -> None:
        """Add a batch: ``(N, F)`` features or codes, ``(N,)`` classes; rows of class -1 are left out."""
        keep = labels >= 0
        codes, own = as_codes(features).rows(keep), labels[keep]
        values = codes.values.detach().double()
        # in place: (C, F) is larger than a batch, and a metric's state is its own
        if codes.indices is None:
            self.total.index_add_(0, own, values)
        else:
            at = own[:, None] * codes.d_sae + codes.indices
            self.total.view(-1).index_add_(0, at.reshape(-1), values.reshape(-1))
        self.count += torch.bincount(own, minlength=len(self.count))

    def compute(self) -> Tensor:
        """``(C, F)`` float64 means; NaN for classes without rows."""
        return self.total / self.count[:, None]


class NearestMean(Metric):
    """Accuracy of the class whose mean has the highest cosine with a row; float64 counts, added over ranks.

    Args:
        means: ``(C, F)`` from other rows; classes with NaN are never predicted.
    """

    full_state_update = False

    def __init__(self, means: Tensor, **kwargs):
        super().__init__(**kwargs)
        self.register_buffer("atoms", normalize(means.double(), dim=1).T.contiguous())  # (F, C), as codes are decoded
        zero = torch.zeros(len(means), dtype=torch.float64, device=means.device)
        self.add_state("hit", zero, dist_reduce_fx="sum")
        self.add_state("count", zero.clone(), dist_reduce_fx="sum")

    def update(self, features: Tensor | Codes, labels: Tensor) -> None:
        """Add a batch of ``(N, F)`` features or codes and their classes; rows of class -1 are left out."""
        keep = labels >= 0
        codes, labels = as_codes(features).rows(keep), labels[keep]
        codes = codes._replace(values=codes.values.detach().double())
        cos = codes.decode_with(self.atoms)  # the norm of a row does not change the order
        cos = cos.nan_to_num(-torch.inf)
        hit = (cos.argmax(1) == labels).double()
        self.hit = self.hit + torch.bincount(labels, hit, len(self.hit))
        self.count = self.count + torch.bincount(labels, minlength=len(self.count))

    def compute(self) -> dict[str, Tensor]:
        """``top1``, ``balanced`` (mean over classes) and ``images``; nothing before any row."""
        if not self.count.sum():
            return {}
        return {
            "top1": self.hit.sum() / self.count.sum(),
            "balanced": (self.hit / self.count).nanmean(),
            "images": self.count.sum(),
        }
