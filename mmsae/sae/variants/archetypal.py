"""Archetypal SAEs (RA-SAE, arXiv 2502.12892): atoms near the convex hull of the data, so that seeds agree on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmsae.sae.dictionary import Dictionary
from mmsae.sae.normaliser import all_reduce
from mmsae.types import InputError


class ArchetypalDictionary(Dictionary):
    """``D = e^scale (mix @ points + relax)``: convex combinations of points of the data, and a little more.

    ``points (n, d)`` are frozen: centroids of the normalised rows, by k-means with a fixed seed, so that trainings on
    the same data have the same ones. ``mix (d_sae, n)`` is row-stochastic and starts as the identity, ``relax (d_sae,
    d)`` has rows of norm ``delta`` at most and starts at 0: atoms start as points. Both are projected after every
    step. Atoms are computed when they are asked for, by a product of size ``d_sae * n * d``.

    Args:
        points: Number n of points; default: one for each latent, which is the least.
        delta: How far an atom may lie from the hull, in the units of the normalised rows; 0 is a pure A-SAE.
        learn_scale: Whether ``scale`` is trained; it starts at 0.
        bias: Whether decoding adds a bias.
    """

    name = "archetypal"
    file_names: ClassVar[Mapping[str, tuple[str, bool]]] = {
        "mix": ("W_dec_mix", False),
        "relax": ("W_dec_relax", False),
        "scale": ("W_dec_scale", False),
        "bias": ("b_dec", False),
    }
    from_rows = True

    def __init__(self, points: int | None = None, delta: float = 1.0, learn_scale: bool = True, bias: bool = True):
        super().__init__("free", bias)
        if delta < 0:
            raise InputError(f"delta must be at least 0, not {delta:g}")
        self.n_points, self.delta, self.learn_scale = points, delta, learn_scale

    def config(self) -> dict[str, Any]:
        return {
            "points": self.n_points,
            "delta": self.delta,
            "learn_scale": self.learn_scale,
            "bias": self.use_bias,
        }

    def build(self, d_in: int, d_sae: int) -> None:
        """Allocate; until rows are seen, the points are random directions.

        Raises:
            InputError: Fewer points than atoms.
        """
        n = d_sae if self.n_points is None else self.n_points
        if n < d_sae:
            raise InputError(f"an archetypal dictionary needs a point for every atom: {n} points for {d_sae} atoms")
        super().build(d_in, d_sae)
        points = nn.functional.normalize(torch.randn(n, d_in))
        del self.weight
        self.register_buffer("points", points)
        self.mix = nn.Parameter(torch.eye(d_sae, n))
        self.relax = nn.Parameter(torch.zeros(d_sae, d_in))
        if self.learn_scale:
            self.scale = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("scale", torch.zeros(()))
        if self.use_bias:
            nn.init.zeros_(self.bias)

    def rows(self) -> Tensor:
        return self.scale.exp() * (self.mix @ self.points + self.relax)

    @torch.no_grad()
    def fit_(self, rows: Mapping[str, Tensor]) -> None:
        """Take the points from the rows, which ranks hold parts of: those of the first rank count.

        Raises:
            InputError: Fewer rows than points.
        """
        from sklearn.cluster import MiniBatchKMeans

        x = torch.cat([v.detach() for v in rows.values()])
        n = len(self.points)
        if len(x) < n:
            raise InputError(f"{n} points cannot be taken from {len(x)} rows: fit on more, or have fewer latents")
        self.points.zero_()
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not ranks or torch.distributed.get_rank() == 0:
            # k-means++ took three quarters of the time and gave no smaller distances (1,024 points of 16,384 rows)
            means = MiniBatchKMeans(
                n, init="random", max_iter=10, batch_size=max(1024, 2 * n), n_init=1, random_state=0
            )
            self.points.copy_(torch.from_numpy(means.fit(x.float().cpu().numpy()).cluster_centers_))
        all_reduce(self.points)

    @torch.no_grad()
    def project_(self) -> None:
        """Make ``mix`` row-stochastic and ``relax`` short; an atom that has lost every point keeps its largest one."""
        most = self.mix.argmax(1, keepdim=True)
        self.mix.clamp_(min=0)
        total = self.mix.sum(1, keepdim=True)
        self.mix.scatter_add_(1, most, (total == 0).to(total)).div_(torch.where(total > 0, total, 1.0))
        self.relax.mul_(self.delta / self.relax.norm(dim=1, keepdim=True).clamp(min=max(self.delta, 1e-12)))

    def remove_parallel_grad_(self) -> None:
        """Nothing: the scale of the atoms is not fixed."""
