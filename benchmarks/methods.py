"""Training problems of one size: their weights and rows, their loss as a dense formula, and mmsae's and naive steps.

The formula in float64 is what every contender's first loss and gradients are compared with; in float32, or under
autocast to bfloat16, it is the naive step. Weights have one form for all: ``W_enc``, ``W_dec (d_sae, d)``, ``b_enc``,
``b_dec``, those of the decoder with the modality as suffix where there are two dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import product_precision
from mmsae.sae import (
    SAE,
    AffineEncoder,
    AuxK,
    BatchTopK,
    CodeCosine,
    Dictionary,
    DistanceEncoder,
    LossContext,
    LossTerm,
    NestedReconstruction,
    PursuitEncoder,
    Reconstruction,
    TopK,
    UsageTracker,
    total,
)
from mmsae.training.adam import kept_by, with_atoms
from mmsae.types import Codes

Rows = Mapping[str, Tensor]  # {modality: (N, d)}
PREFIXES = (1 / 16, 3 / 16, 7 / 16)  # inner ends of Matryoshka's groups, as shares of the latents
AUXK, COSINE = 1 / 32, 0.1  # coefficients
DEAD = 0.1  # share of the latents that count as dead
QUIET = 0.3  # norm of their encoder rows: positive pre-codes that are never among the largest of a row
PAIRS = ("vl_sae", "paired_topk")  # of two modalities
WITH_AUXK = ("topk_auxk", "paired_topk")


@dataclass(frozen=True)
class Problem:
    """One training step's size."""

    method: str
    d: int
    d_sae: int
    k: int
    batch: int

    def __str__(self) -> str:
        return f"{self.method} {self.d}/{self.d_sae}/{self.k}/{self.batch}"

    @property
    def modalities(self) -> tuple[str, ...]:
        """One or two."""
        return ("image", "text") if self.method in PAIRS else ("image",)

    def name(self, weight: str, modality: str) -> str:
        """What a decoder's weight is called."""
        return f"{weight}.{modality}" if self.method in PAIRS else weight

    def weights(self, device: str) -> dict[str, Tensor]:
        """The start of every contender, float32; the caller's own."""
        return {name: w.clone().to(device) for name, w in _weights(self).items()}

    def rows(self, device: str, n: int = 0) -> dict[str, Tensor]:
        """``{modality: (n, d)}`` normal rows; n defaults to the batch."""
        g = torch.Generator().manual_seed(1)
        return {m: torch.randn(n or self.batch, self.d, generator=g).to(device) for m in self.modalities}

    def dead(self, device: str) -> Tensor:
        """``(d_sae,)`` bool: the latents that count as dead, where AuxK is active."""
        order = torch.randperm(self.d_sae, generator=torch.Generator().manual_seed(2))
        mask = torch.zeros(self.d_sae, dtype=torch.bool)
        mask[order[: round(DEAD * self.d_sae)]] = True
        return mask.to(device)


@lru_cache(1)  # a size's contenders come after each other, and large ones take seconds to draw
def _weights(problem: Problem) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = problem.d_sae, problem.d
    atoms = {m: F.normalize(torch.randn(shape, generator=g)) for m in problem.modalities}
    near = next(iter(atoms.values())) + 0.3 * problem.d**-0.5 * torch.randn(shape, generator=g)
    found = {} if problem.method == "mp" else {"W_enc": F.normalize(near)}
    if problem.method in WITH_AUXK:
        found["W_enc"][problem.dead("cpu")] *= QUIET
    if problem.method not in ("mp", "vl_sae"):
        found["b_enc"] = 0.01 * torch.randn(problem.d_sae, generator=g)
    for m, rows in atoms.items():
        found |= {problem.name("W_dec", m): rows, problem.name("b_dec", m): torch.zeros(problem.d)}
    return found


# ---------------------------------------------------------------------------------------------- the dense formulas
def kept(u: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """``(N, d_sae)`` with ``values`` at ``indices`` and 0 elsewhere."""
    return torch.zeros_like(u).scatter(1, indices, values.to(u.dtype))


def auxk_error(problem: Problem, residual: Tensor, u: Tensor, w_dec: Tensor, dead: Tensor) -> Tensor:
    """Dead latents against the residual, in units of the residual's variance."""
    top = torch.where(dead, u.relu(), -torch.inf).topk(min(problem.d // 2, int(dead.sum())))
    error = (residual - kept(u, top.indices, top.values) @ w_dec).square().sum(1).mean()
    return error / (residual - residual.mean(0)).square().sum(1).mean()


def codes(problem: Problem, u: Tensor) -> Tensor:
    """``(N, d_sae)`` what the method keeps of pre-codes."""
    if problem.method in ("batch_topk", "matryoshka"):
        flat = u.relu().reshape(-1)
        top = flat.topk(problem.k * len(u))
        return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(u)
    top = u.topk(problem.k)
    return kept(u, top.indices, top.values.relu())


def formula(problem: Problem, w: Mapping[str, Tensor], x: Rows, dead: Tensor) -> Tensor:
    """The loss: errors summed over features, mean over rows and modalities (VL-SAE: its own)."""
    if problem.method == "vl_sae":
        return published_vl_sae(problem, w, x)
    if problem.method == "mp":
        (v,) = x.values()
        return matching_pursuit(v - w["b_dec"], w["W_dec"], problem.k)[0].square().sum(1).mean()
    total, all_codes = 0.0, []
    for m, v in x.items():
        w_dec, b_dec = (w[problem.name(n, m)] for n in ("W_dec", "b_dec"))
        u = (v - b_dec) @ w["W_enc"].T + w["b_enc"]
        z = codes(problem, u)
        ends = [round(p * problem.d_sae) for p in PREFIXES] if problem.method == "matryoshka" else []
        recon, levels, start = b_dec, [], 0
        for end in (*ends, problem.d_sae):
            recon, start = recon + z[:, start:end] @ w_dec[start:end], end
            levels.append((v - recon).square().sum(1).mean())
        total = total + sum(levels) / len(levels)
        if problem.method in WITH_AUXK:
            total = total + AUXK * auxk_error(problem, (v - recon).detach(), u, w_dec, dead)
        all_codes.append(z)
    total = total / len(x)
    if problem.method == "paired_topk":
        total = total + COSINE * (1 - F.cosine_similarity(*all_codes).mean())
    return total


def published_vl_sae(problem: Problem, w: Mapping[str, Tensor], x: Rows) -> Tensor:
    """The published model's step (arXiv 2510.21323): ``cdist``, a ``kthvalue`` mask and dense decoders."""
    total = 0.0
    for m, v in x.items():
        a = 2 - torch.cdist(F.normalize(v, dim=1), F.normalize(w["W_enc"], dim=1))
        threshold = a.detach().kthvalue(a.shape[1] - problem.k, dim=1, keepdim=True).values
        recon = F.linear(a * (a > threshold), w[f"W_dec.{m}"].T, w[f"b_dec.{m}"])
        total = total + F.mse_loss(recon, v)
    return total


def matching_pursuit(left: Tensor, atoms: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """``(N, d)`` what is left of rows after so many steps, and ``(N, d_sae)`` their codes, by definition."""
    found = left.new_zeros(len(left), len(atoms))
    for _ in range(steps):
        best = (left @ atoms.T).argmax(1, keepdim=True)
        d = atoms[best[:, 0]]
        value = (left * d).sum(1, keepdim=True).relu()
        left, found = left - value * d, found.scatter_add(1, best, value)
    return left, found


# --------------------------------------------------------------------------------------------------- contenders
class Contender:
    """One way to do an optimiser step; called with rows, it does one.

    A step is: loss, gradients, what the library does to them beside clipping, fused Adam, and what it does to the
    weights afterwards. Clipping and counting which latents fire are left out for all.
    """

    precision: str = "fp32"  #: Of products; on a CPU, tf32 is fp32.
    name: str

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem, self.device = problem, device
        self.dead = problem.dead(device)
        with torch.device(device):  # large weights take seconds to draw on a CPU
            self.build()
        with torch.no_grad():
            for name, value in problem.weights(device).items():
                if name in self.weights():
                    w, transposed = self.weights()[name]
                    w.copy_(value.T if transposed else value)
        self.optimizer = self.optimised(torch.optim.Adam([w for w, _ in self.weights().values()], lr=1e-4, fused=True))

    def build(self) -> None:
        """Make the model."""
        raise NotImplementedError

    def weights(self) -> dict[str, tuple[nn.Parameter, bool]]:
        """``{name: (what is trained, whether it is transposed)}``."""
        raise NotImplementedError

    def optimised(self, adam: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The library's own form of fused Adam, if it has one."""
        return adam

    def loss(self, x: Rows) -> Tensor:
        """Of rows, with gradients."""
        raise NotImplementedError

    def unit(self, x: Rows) -> float:
        """What the loss is multiplied by to be that of the formula."""
        return 1.0

    def tangent(self) -> None:
        """What is done to gradients."""

    def project(self) -> None:
        """What is done to weights after the optimiser."""

    def context(self) -> AbstractContextManager:
        """Settings under which loss and gradients are computed."""
        return product_precision(self.precision)

    def encode(self, x: Tensor) -> Any:
        """Codes of ``(N, d)`` rows of one modality, in the library's own form."""
        raise NotImplementedError

    def decode(self, codes: Any) -> Tensor:
        """``(N, d)`` rows of codes in that form."""
        raise NotImplementedError

    def dense(self, codes: Any) -> Tensor:
        """``(N, d_sae)`` of codes in that form."""
        return codes

    def __call__(self, x: Rows) -> Tensor:
        with self.context():
            loss = self.loss(x)
            loss.backward()
            self.tangent()
            self.optimizer.step()
            self.project()
            self.optimizer.zero_grad()  # at the end, so that those of all contenders need not fit beside each other
        return loss.detach()


class Naive(Contender):
    """The dense formula with torch's autograd."""

    name = "dense"

    def build(self) -> None:
        self.w = {name: nn.Parameter(w) for name, w in self.problem.weights(self.device).items()}

    def weights(self) -> dict[str, tuple[nn.Parameter, bool]]:
        return {name: (w, False) for name, w in self.w.items()}

    def loss(self, x: Rows) -> Tensor:
        return formula(self.problem, self.w, x, self.dead)

    def encode(self, x: Tensor) -> Tensor:
        if self.problem.method == "mp":
            return matching_pursuit(x - self.w["b_dec"], self.w["W_dec"], self.problem.k)[1]
        return codes(self.problem, (x - self.w["b_dec"]) @ self.w["W_enc"].T + self.w["b_enc"])

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.w["W_dec"] + self.w["b_dec"]


class NaiveHalf(Naive):
    """The same under autocast to bfloat16."""

    name, precision = "dense, bf16 autocast", "bf16"

    def loss(self, x: Rows) -> Tensor:
        with self.half():
            return super().loss(x)

    def half(self) -> AbstractContextManager:
        """Autocast."""
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)

    def encode(self, x: Tensor) -> Tensor:
        with self.half():
            return super().encode(x)

    def decode(self, codes: Tensor) -> Tensor:
        with self.half():
            return super().decode(codes)


def composed(problem: Problem, **options: Any) -> tuple[SAE, list[LossTerm]]:
    """The SAE of mmsae for a problem, with its losses; ``options`` are further ones of the SAE."""
    two = problem.method in PAIRS
    free = {"norm": "free"} if problem.method == "vl_sae" else {}
    parts: dict[str, Any] = {"encoder": AffineEncoder(), "selector": TopK(problem.k)}
    losses: list[LossTerm] = [Reconstruction("sum")]
    if problem.method == "vl_sae":
        parts["encoder"], losses = DistanceEncoder(), [Reconstruction("mse")]
    if problem.method in ("batch_topk", "matryoshka"):
        parts["selector"] = BatchTopK(problem.k)
    if problem.method == "matryoshka":
        losses = [NestedReconstruction(PREFIXES, reduction="sum")]
    if problem.method == "mp":
        parts = {"encoder": PursuitEncoder(steps=problem.k)}
    if problem.method in WITH_AUXK:
        losses.append(AuxK(AUXK, dead_after=1))
    if problem.method == "paired_topk":
        losses.append(CodeCosine(COSINE))
    dictionaries = {key: Dictionary(**free) for key in (problem.modalities if two else ("shared",))}
    sae = SAE(problem.d, problem.d_sae, modalities=problem.modalities, dictionaries=dictionaries, **parts, **options)
    return sae, losses


class Ours(Contender):
    """The step of mmsae."""

    name = "mmsae"

    def __init__(self, problem: Problem, device: str, backend: str = "", precision: str = "") -> None:
        self.backend, self.asked = backend, precision
        self.precision = precision or "tf32"  # the default on CUDA
        self.name = " ".join(p for p in ("mmsae", backend, precision) if p)
        super().__init__(problem, device)

    def build(self) -> None:
        sae, self.losses = composed(self.problem, **({"precision": self.asked} if self.asked else {}))
        self.sae = sae.train()
        usage = UsageTracker(sae.d_sae, sae.modalities)
        usage.since[:, self.dead] = 1
        self.ctx = LossContext(self.sae, usage)

    def weights(self) -> dict[str, tuple[nn.Parameter, bool]]:
        encoder, found = self.sae.encoder, {}
        for name in ("weight", "bias"):
            if isinstance(own := getattr(encoder, name, None), nn.Parameter):
                found[{"weight": "W_enc", "bias": "b_enc"}[name]] = (own, False)
        for m in self.problem.modalities:
            dictionary = self.sae.dictionary(m)
            found |= {
                self.problem.name("W_dec", m): (dictionary.weight, False),
                self.problem.name("b_dec", m): (dictionary.bias, False),
            }
        return found

    def loss(self, x: Rows) -> Tensor:
        outputs = self.sae(x)
        return total([term(outputs, self.ctx) for term in self.losses])

    def encode(self, x: Tensor) -> Codes:
        return self.sae.encode(x)

    def decode(self, codes: Codes) -> Tensor:
        return self.sae.decode(codes)

    def dense(self, codes: Codes) -> Tensor:
        return codes.to_dense()

    def optimised(self, adam: torch.optim.Optimizer) -> torch.optim.Optimizer:
        with self.context():
            found = with_atoms(adam, self.sae, tangent=True)
        self.in_step = kept_by(found)
        return found

    def tangent(self) -> None:
        self.sae.remove_parallel_grad_(self.in_step.tangent)

    def project(self) -> None:
        self.sae.after_step_(self.in_step.unit)

    def context(self) -> AbstractContextManager:
        if not self.backend:
            return nullcontext()
        from mmsae.kernels import use

        return use(self.backend)


class Exact(NamedTuple):
    """What the formula says in float64 of some rows."""

    x: Rows  #: In float32.
    loss: float = 0.0
    gradients: Mapping[str, Tensor] = {}  #: Of every weight.
    codes: Tensor | None = None  #: ``(N, d_sae)``.
    reconstruction: Tensor | None = None  #: ``(N, d)``.


def exact_step(problem: Problem, device: str, n: int) -> Exact:
    """Loss and gradients of n rows."""
    x = problem.rows(device, n)
    w = {name: v.double().requires_grad_() for name, v in problem.weights(device).items()}
    loss = formula(problem, w, {m: v.double() for m, v in x.items()}, problem.dead(device))
    loss.backward()
    return Exact(x, float(loss.detach()), {name: v.grad for name, v in w.items()})


def step_agreement(contender: Contender, exact: Exact) -> dict[str, Any]:
    """How far the first loss and gradients are from the formula, relative.

    Returns:
        ``loss``, ``gradients`` (the worst of the weights', of the norm), and ``without``, the weights that the
        contender does not have.
    """
    with contender.context():
        loss = contender.loss(exact.x)
        loss.backward()
    unit, worst = contender.unit(exact.x), 0.0
    for name, (w, transposed) in contender.weights().items():
        grad = torch.zeros_like(w) if w.grad is None else w.grad
        grad, want = (grad.T if transposed else grad).double() * unit, exact.gradients[name]
        worst = max(worst, float((grad - want).norm() / want.norm().clamp(min=1e-30)))
    contender.optimizer.zero_grad()
    return {
        "loss": abs(float(loss.detach()) * unit - exact.loss) / exact.loss,
        "gradients": worst,
        "without": sorted(set(exact.gradients) - set(contender.weights())),
    }


@torch.no_grad()
def exact_codes(problem: Problem, device: str, n: int) -> Exact:
    """Codes and reconstructions of n rows of one modality."""
    x = problem.rows(device, n)
    w = {name: v.double() for name, v in problem.weights(device).items()}
    (rows,) = (v.double() - w["b_dec"] for v in x.values())
    if problem.method == "mp":
        z = matching_pursuit(rows, w["W_dec"], problem.k)[1]
    else:
        z = codes(problem, rows @ w["W_enc"].T + w["b_enc"])
    return Exact(x, codes=z, reconstruction=z @ w["W_dec"] + w["b_dec"])


@torch.no_grad()
def codes_agreement(contender: Contender, exact: Exact) -> dict[str, Any]:
    """How far ``codes`` and ``reconstruction`` of rows are from the formula, of the norm."""
    (x,) = exact.x.values()
    with contender.context():
        found = contender.encode(x)
        back = contender.decode(found)
    wanted = {"codes": exact.codes, "reconstruction": exact.reconstruction}
    given = {"codes": contender.dense(found), "reconstruction": back}
    return {name: float((given[name] - want).norm() / want.norm()) for name, want in wanted.items()}


#: Of gradients and codes, relative: rounding in float32, and what selection among near ties costs at lower precision.
TOLERANCE = {"fp32": 1e-3, "tf32": 0.1, "bf16": 0.3}


def tolerated(contender: Contender, cuda: bool) -> float:
    """How far a contender's gradients may be from the formula's."""
    precision = contender.precision
    return TOLERANCE["fp32" if precision == "tf32" and not cuda else precision]
