"""The SAEs of ``configs/sae`` at the size of a world, and what is chosen for them before a figure is reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmsae.bench.recover.measures import recovery
from mmsae.bench.recover.worlds import KnownWorld
from mmsae.bench.sized import CONTROLS, SPARSITY, Size, modalities_of, needs_gradients, sae_recipes, scaled_terms, sized
from mmsae.sae import SAE, LossTerm
from mmsae.training.plain import train
from mmsae.types import Tokens

LR = 1e-2  #: Of every SAE that is trained; it was not chosen by any figure of this benchmark.
ROWS = 256  #: Rows of each modality a step.
TUNING_SEED = 1000  #: Of worlds and trainings by which strengths are chosen; no figure of theirs is reported.
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Variant(NamedTuple):
    """One row of the benchmark: a recipe of ``configs/sae``, or a control of it."""

    recipe: Path
    control: str = ""  #: Empty, or one of :data:`mmsae.bench.sized.CONTROLS`.

    @property
    def has_strength(self) -> bool:
        """Whether there is no k and no target, but a coefficient that sets how sparse codes are."""
        return scaled_terms(self.recipe, SPARSITY)

    def fits(self, world: str) -> bool:
        """Whether the variant can be trained on a world: some recipes need two modalities, some gradients."""
        if needs_gradients(self.recipe):
            return world == "downstream"
        return len(modalities_of(self.recipe)) == 1 or world == "two_modalities"


def variants() -> dict[str, Variant]:
    """Every SAE in ``configs/sae`` by the name of its recipe, and the controls of TopK."""
    found = {name: Variant(path) for name, path in sae_recipes().items()}
    return found | {f"topk ({control})": Variant(found["topk"].recipe, control) for control in CONTROLS}


def model_of(recipe: Path, world: KnownWorld, steps: int, strength: float = 1.0) -> tuple[SAE, list[LossTerm]]:
    """The SAE of a recipe with as many latents as a world has atoms, and its loss terms."""
    size = Size(world.width, world.size, world.k, list(world.atoms), steps, ROWS)
    return sized(recipe, size, SPARSITY, strength)


class WorldRows(NamedTuple):
    """Activations of a world for trainings with one seed, and others for their figures."""

    world: KnownWorld
    seed: int
    train: dict[str, Tensor]  #: ``{modality: (N, d)}``.
    test: dict[str, Tensor]  #: ``{modality: (n, d)}``, rows of their own.
    codes: Tensor  #: ``(n, atoms)`` the true codes of the test rows.
    grad: dict[str, Tensor] | None  #: Gradients at the training rows, where a classifier reads them.

    @classmethod
    def draw(cls, make: Callable[[int], KnownWorld], seed: int, train: int = 100_000, test: int = 4096) -> WorldRows:
        """The world of a seed and its rows."""
        world = make(seed)
        x, codes = world.sample(train, 2 * seed)
        grad = {m: world.gradient(v, codes) for m, v in x.items()} if world.head is not None else None
        return cls(world, seed, x, *world.sample(test, 2 * seed + 1), grad)

    def batches(self) -> Iterator[Tokens]:
        """Batches without end, drawn from the training rows."""
        generator = torch.Generator().manual_seed(self.seed)
        n = len(next(iter(self.train.values())))
        while True:
            rows = torch.randint(n, (ROWS,), generator=generator)
            grad = {m: g[rows] for m, g in self.grad.items()} if self.grad else None
            yield Tokens.pooled({m: x[rows] for m, x in self.train.items()})._replace(grad=grad)


def figures(variant: Variant, rows: WorldRows, steps: int, strength: float = 1.0) -> dict[str, float]:
    """What a variant recovers of a world: :func:`recovery`, and the CPU ``seconds`` of the training."""
    torch.manual_seed(rows.seed)
    sae, losses = model_of(variant.recipe, rows.world, steps, strength)
    sae.fit_normaliser(rows.train)
    start = time.process_time()
    freeze = CONTROLS[variant.control] if variant.control else ""
    if freeze is not None:
        train(sae, losses, rows.batches(), steps, LR, rows.seed, freeze=freeze)
    seconds = time.process_time() - start
    return {**recovery(sae.eval(), rows.world, rows.test, rows.codes), "seconds": seconds, "strength": strength}


def chosen_strength(variant: Variant, rows: WorldRows, steps: int) -> float:
    """The strength whose L0 is nearest to the world's budget, as a ratio; ``rows`` are of the tuning seed."""

    def miss(strength: float) -> float:
        return abs(math.log(max(figures(variant, rows, steps, strength)["l0"], 1e-6) / rows.world.k))

    return min(STRENGTHS, key=miss)
