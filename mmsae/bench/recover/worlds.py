"""Activations with known atoms and codes, one world for each thing that papers about SAEs say of data.

``x = codes @ atoms + mean + noise``. What differs is which latents are on together, how often, and with which sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

IMAGE, TEXT = "image", "text"
Draw = Callable[[int, torch.Generator], Tensor]
"""``(n, generator) -> (n, atoms)`` true codes."""


class KnownWorld(NamedTuple):
    """A distribution of activations of which the truth is known."""

    name: str
    about: str  #: What it is, in one sentence.
    atoms: dict[str, Tensor]  #: ``{modality: (n, d)}``, unit norm.
    mean: dict[str, Tensor]  #: ``{modality: (d,)}``.
    draw: Draw
    l0: float  #: Mean number of atoms that a row has.
    signed: bool = False  #: Whether codes may be negative.
    parents: Tensor | None = None  #: ``(n,)`` parent of every atom, -1 for none; None where there is no hierarchy.
    noise: float = 0.05  #: Expected norm of the noise of a row.
    budget: float | None = None  #: What SAEs get in place of the true L0.
    head: Tensor | None = None  #: ``(d, classes)`` a classifier that reads the rows; None where nothing does.

    @property
    def width(self) -> int:
        """Features of a row."""
        return next(iter(self.atoms.values())).shape[1]

    @property
    def size(self) -> int:
        """Number of atoms."""
        return next(iter(self.atoms.values())).shape[0]

    @property
    def k(self) -> float:
        """Mean number of latents that SAEs are given or brought to: the true L0, unless the world says otherwise."""
        return self.l0 if self.budget is None else self.budget

    def sample(self, n: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        """``{modality: (n, d) activations}``, pairs where there are two, and their ``(n, atoms)`` true codes."""
        g = _generator(seed)
        codes = self.draw(n, g)
        x = {}
        for m, atoms in self.atoms.items():
            noise = torch.randn(n, atoms.shape[1], generator=g) * (self.noise / atoms.shape[1] ** 0.5)
            x[m] = codes @ atoms + self.mean[m] + noise
        return x, codes

    def loss(self, x: Tensor, codes: Tensor) -> Tensor:
        """``(N,)`` cross-entropy of the classifier on rows ``x``, for what it says of the rows without noise."""
        labels = (codes @ next(iter(self.atoms.values())) @ self.head).argmax(1)
        return cross_entropy(x @ self.head, labels, reduction="none")

    def gradient(self, x: Tensor, codes: Tensor) -> Tensor:
        """``(N, d)`` gradient of every row's loss."""
        with torch.enable_grad():
            rows = x.detach().requires_grad_()
            return torch.autograd.grad(self.loss(rows, codes).sum(), rows)[0]


def _uniform(n: int, k: int, generator: torch.Generator, atoms: int) -> Tensor:
    on = torch.rand(n, atoms, generator=generator).topk(k).indices
    return torch.zeros(n, atoms).scatter(1, on, _weights((n, k), generator))


def _weights(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return 0.5 + torch.rand(shape, generator=generator)


def _bernoulli(probability: Tensor) -> Draw:
    def draw(n: int, g: torch.Generator) -> Tensor:
        on = torch.rand(n, len(probability), generator=g) < probability
        return on * _weights((n, len(probability)), g)

    return draw


def _generator(seed: int) -> torch.Generator:
    """Of a world's own; an SAE that is initialised with the same seed must not start at the truth."""
    return torch.Generator().manual_seed(982_451_653 + 101 * seed)


def _random_atoms(n: int, d: int, seed: int) -> Tensor:
    return normalize(torch.randn(n, d, generator=_generator(seed)))


def independent(seed: int, n: int = 64, d: int = 32, k: int = 3) -> KnownWorld:
    """Three of 64 atoms in 32 dimensions, all equally likely."""
    atoms = {IMAGE: _random_atoms(n, d, seed)}
    about = "3 of 64 atoms in 32 dimensions, equally likely"
    return KnownWorld("independent", about, atoms, _no_mean(atoms), lambda rows, g: _uniform(rows, k, g, n), k)


def _no_mean(atoms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {m: a.new_zeros(a.shape[1]) for m, a in atoms.items()}


def correlated(seed: int, n: int = 64, d: int = 32, k: int = 3, block: int = 4, share: float = 0.7) -> KnownWorld:
    """Atoms of a block of four are on together more often than by chance: their scores share a block's part."""
    atoms = {IMAGE: _random_atoms(n, d, seed)}

    def draw(rows: int, g: torch.Generator) -> Tensor:
        common = torch.randn(rows, n // block, generator=g).repeat_interleave(block, 1)
        score = share**0.5 * common + (1 - share) ** 0.5 * torch.randn(rows, n, generator=g)
        on = score > torch.special.ndtri(torch.tensor(1 - k / n))
        return on * _weights((rows, n), g)

    return KnownWorld("correlated", "atoms come in blocks of 4 that are on together", atoms, _no_mean(atoms), draw, k)


def hierarchical(seed: int, d: int = 20) -> KnownWorld:
    """The tree of matching-pursuit SAEs (arXiv 2506.03093): 3 parents with 3 exclusive children each, and 8 leaves.

    Parents have probability .2, children .2 each where their parent is on, leaves .05; magnitudes N(1.5, .25^2); the 20
    atoms are orthonormal. The mean L0 is 1.36.
    """
    basis = torch.linalg.qr(torch.randn(d, d, generator=_generator(seed))).Q
    atoms = {IMAGE: basis[:20]}
    parents = torch.tensor([-1] * 3 + [i // 3 for i in range(9)] + [-1] * 8)

    def draw(rows: int, g: torch.Generator) -> Tensor:
        on = torch.zeros(rows, 20, dtype=torch.bool)
        on[:, :3] = torch.rand(rows, 3, generator=g) < 0.2
        which = (torch.rand(rows, 3, generator=g) / 0.2).long()  # 0, 1, 2: that child; 3, 4: none
        for p in range(3):
            for c in range(3):
                on[:, 3 + 3 * p + c] = on[:, p] & (which[:, p] == c)
        on[:, 12:] = torch.rand(rows, 8, generator=g) < 0.05
        return on * (1.5 + 0.25 * torch.randn(rows, 20, generator=g)).clamp(min=0)

    about = "3 parents with 3 exclusive children each, 8 leaves"
    return KnownWorld("hierarchical", about, atoms, _no_mean(atoms), draw, 1.36, parents=parents)


def bidirectional(seed: int, n: int = 64, d: int = 32, k: int = 3) -> KnownWorld:
    """Every atom is a direction with two ends: codes have random signs."""
    atoms = {IMAGE: _random_atoms(n, d, seed)}

    def draw(rows: int, g: torch.Generator) -> Tensor:
        codes = _uniform(rows, k, g, n)
        return codes * (2.0 * (torch.rand(rows, n, generator=g) < 0.5) - 1.0)

    return KnownWorld("bidirectional", "codes have random signs", atoms, _no_mean(atoms), draw, k, signed=True)


def heavy_tailed(seed: int, n: int = 64, d: int = 32, k: float = 3.0) -> KnownWorld:
    """Frequencies fall as 1 / rank (Zipf), the most frequent atom at .5 at most; L0 varies from row to row."""
    atoms = {IMAGE: _random_atoms(n, d, seed)}
    probability = 1 / torch.arange(1, n + 1, dtype=torch.float)
    for _ in range(50):  # capping takes mass, which the others get
        probability = (probability * k / probability.sum()).clamp(max=0.5)
    return KnownWorld(
        "heavy_tailed", "frequencies fall as 1 / rank", atoms, _no_mean(atoms), _bernoulli(probability), k
    )


def downstream(
    seed: int, n: int = 64, d: int = 32, weak: int = 16, size: float = 0.4, gain: float = 10.0
) -> KnownWorld:
    """A classifier of 8 classes reads the one weak atom of a row, of 16 in a subspace of 8 dimensions.

    Three strong atoms of the other 24 dimensions are on beside it, and an SAE gets 3 latents a row for the four: what
    reconstructs best is not what matters.
    """
    apart = torch.zeros(n, d)
    apart[:weak, :8] = _random_atoms(weak, 8, seed)
    apart[weak:, 8:] = _random_atoms(n - weak, d - 8, seed + 1)
    turn = torch.linalg.qr(torch.randn(d, d, generator=_generator(seed + 2))).Q
    atoms = {IMAGE: apart @ turn}
    classes = torch.nn.functional.one_hot(torch.arange(weak) % 8, 8).float()
    head = 10.0 * atoms[IMAGE][:weak].t() @ classes

    def draw(rows: int, g: torch.Generator) -> Tensor:
        return torch.cat([size * _uniform(rows, 1, g, weak), _uniform(rows, 3, g, n - weak)], 1)

    about = "a classifier reads 1 weak atom beside 3 strong ones, SAEs get 3 latents"
    return KnownWorld("downstream", about, atoms, _no_mean(atoms), draw, 4, head=head, budget=3)


def two_modalities(
    seed: int, n: int = 64, d: int = 32, k: int = 3, cosine: float = 0.7, gap: float = 2.0
) -> KnownWorld:
    """Pairs with one code, seen through dictionaries of cosine .7 and an offset of norm 2 for each modality."""
    common = _random_atoms(n, d, seed)
    atoms, mean = {}, {}
    for i, m in enumerate((IMAGE, TEXT)):
        own = _random_atoms(n, d, seed + 7919 * (i + 1))
        atoms[m] = normalize(cosine**0.5 * common + (1 - cosine) ** 0.5 * own)
        mean[m] = gap * _random_atoms(1, d, seed + 104_729 * (i + 1))[0]
    about = "pairs: one code, two dictionaries of cosine .7, an offset each"
    return KnownWorld("two_modalities", about, atoms, mean, lambda rows, g: _uniform(rows, k, g, n), k)


WORLDS: dict[str, Callable[[int], KnownWorld]] = {
    f.__name__: f
    for f in (independent, correlated, hierarchical, bidirectional, heavy_tailed, downstream, two_modalities)
}
