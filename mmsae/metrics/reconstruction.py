"""How much of the data a reconstruction explains, pooled over the data, whatever the batch split or number of ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from mmsae.types import ROLES

JOINT = "joint"


class ReconstructionMetrics(Metric):
    """FVU, explained variance and cosine, per modality and over all of them.

    ``FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2`` with the mean taken over the data seen, so a decoder that always
    returns the mean scores 1.0. ``joint`` divides the summed errors by the summed variances, each modality about its
    own mean. States are float64 sums, added over ranks: the figures do not depend on batch order, batch size or ranks.

    Args:
        widths: ``{modality: d}``.
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self, widths: Mapping[str, int], **kwargs):
        super().__init__(**kwargs)
        self.widths = dict(widths)
        for m, d in self.widths.items():
            for name, shape in (("n", ()), ("sum_x", (d,)), ("sum_x2", ()), ("sse", ()), ("cos", ())):
                self.add_state(f"{m}_{name}", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x_hat: Mapping[str, Tensor], x: Mapping[str, Tensor]) -> None:
        """Add one batch: ``{modality: (N, d)}`` reconstructions and raw activations, both in the units of x."""
        for m in x:
            a, b = x_hat[m].detach().double(), x[m].detach().double()
            self._add(m, "n", torch.tensor(len(b), dtype=torch.float64, device=b.device))
            self._add(m, "sum_x", b.sum(0))
            self._add(m, "sum_x2", b.square().sum())
            self._add(m, "sse", (b - a).square().sum())
            self._add(m, "cos", torch.cosine_similarity(a, b).sum())

    def _add(self, m: str, name: str, value: Tensor) -> None:
        setattr(self, f"{m}_{name}", getattr(self, f"{m}_{name}") + value)

    def _sums(self, m: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, s, s2, sse, cos = (getattr(self, f"{m}_{k}") for k in ("n", "sum_x", "sum_x2", "sse", "cos"))
        return sse, (s2 - s.square().sum() / n).clamp(min=0), cos, n

    def compute(self) -> dict[str, Tensor]:
        """``{"fvu/image": ..., "explained_variance/image": ..., "cosine/image": ..., "fvu/joint": ...}``.

        Float64 scalars. A modality that has seen no rows is left out.
        """
        sums = {m: s for m in self.widths if (s := self._sums(m))[3] > 0}
        if sums:
            sums[JOINT] = tuple(torch.stack(t).sum() for t in zip(*sums.values(), strict=True))
        out = {}
        for m, (sse, sst, cos, n) in sums.items():
            out[f"fvu/{m}"] = sse / sst
            out[f"explained_variance/{m}"] = 1 - sse / sst
            out[f"cosine/{m}"] = cos / n
        return out


class FlaggedError(Metric):
    """Mean squared error of the rows that have a flag, in raw units, over rows and features of all modalities.

    ``mse/special`` is that of class, BOS, EOS, padding and template tokens, and ``mse/role/NAME`` that of every role of
    a conversation: of data that carry these flags. In means over all rows they are lost: they are few, and of other
    size. States are float64 sums, added over ranks.
    """

    full_state_update = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.names = ("special", *(f"role/{role}" for role in ROLES))
        for name in ("sse", "n"):
            self.add_state(name, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x_hat: Tensor, x: Tensor, special: Tensor | None = None, role: Tensor | None = None) -> None:
        """Add rows ``(N, d)`` with their flags ``(N,)``, or nothing (every rank must have states to sum)."""
        if special is None and role is None:
            return
        error = (x_hat.detach().double() - x.detach().double()).square().sum(1)
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        flags = [none if special is None else special.bool()]
        flags += [none if role is None else role == i for i in range(len(ROLES))]
        flagged = torch.stack(flags).double()
        self.sse, self.n = self.sse + flagged @ error, self.n + x.shape[1] * flagged.sum(1)

    def compute(self) -> dict[str, Tensor]:
        """``{"mse/special": ..., "mse/role/answer": ...}``, of the flags that some row had."""
        return {f"mse/{name}": self.sse[i] / self.n[i] for i, name in enumerate(self.names) if self.n[i] > 0}


class FVU(ReconstructionMetrics):
    """Fraction of variance unexplained of one stream, one float64 scalar; see :class:`ReconstructionMetrics`."""

    higher_is_better = False

    def __init__(self, d_in: int, **kwargs):
        super().__init__({"x": d_in}, **kwargs)

    def update(self, x_hat: Tensor, x: Tensor) -> None:
        """Add one batch of ``(N, d_in)`` reconstructions and activations."""
        super().update({"x": x_hat}, {"x": x})

    def compute(self) -> Tensor:
        """The FVU; NaN when no row was seen."""
        return super().compute().get("fvu/x", self.x_n * torch.nan)


def fvu(x_hat: Tensor, x: Tensor) -> float:
    """FVU of one ``(N, d)`` tensor about the mean of its rows; the two may lie on different devices."""
    metric = FVU(x.shape[1]).to(x.device)
    metric.update(x_hat.to(x.device), x)
    return metric.compute().item()
