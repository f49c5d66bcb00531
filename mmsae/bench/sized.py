"""The SAEs of ``configs/sae`` at the size of a benchmark, and their training on rows that are in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsae.recipes import instantiate, read_recipe, recipes_of
from mmsae.sae import SAE, LossTerm
from mmsae.training.plain import train

#: Loss terms whose coefficient sets the number of latents where there is no k and no target.
SPARSITY = ("L1", "L0", "TanhL0")
FRACTIONAL = ("BatchTopK", "FeatureChoice")  #: Selectors whose k need not be whole.
PAIR = ("image", "text")
#: Controls of an SAE, by name: what is frozen in the training (:class:`mmsae.training.freeze.Freeze`); None: untrained.
CONTROLS: dict[str, str | None] = {
    "untrained": None,
    "decoder frozen": "decoder",
    "decoder soft-frozen": "soft_decoder",
    "encoder frozen": "encoder",
}


@dataclass(frozen=True)
class Size:
    """What a benchmark gives every SAE."""

    width: int  #: Features of a row.
    d_sae: int  #: Number of latents.
    k: float  #: Latents of a row, on average; rounded up where k is whole.
    modalities: Sequence[str]  #: Those of the data; recipes of one modality get all of them.
    steps: int  #: Steps of the training.
    rows: int  #: Rows of each modality a step.


def sae_recipes() -> dict[str, Path]:
    """Every recipe of ``configs/sae`` by its name."""
    return {path.stem: path for path in recipes_of("sae")}


def modalities_of(recipe: Path) -> tuple[str, ...]:
    """The modalities that a recipe names, or the pair that is the default."""
    return tuple(read_recipe(str(recipe))["model"]["sae"]["init_args"].get("modalities", PAIR))


def needs_gradients(recipe: Path) -> bool:
    """Whether a recipe ranks latents by the gradient of a host's loss, so that its data must bring one."""
    selector = read_recipe(str(recipe))["model"]["sae"]["init_args"].get("selector", {})
    return selector.get("class_path", "").endswith(".GradientTopK")


def centres(recipe: Path) -> bool:
    """Whether a recipe's normaliser takes the modality's mean off the rows."""
    normaliser = read_recipe(str(recipe))["model"]["sae"]["init_args"].get("normaliser", {})
    return bool(normaliser.get("init_args", {}).get("centre"))


def terms_of(model: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """``(class name, arguments)`` of a recipe's loss terms; the arguments may be changed in place."""
    return [(t["class_path"].rpartition(".")[2], t.setdefault("init_args", {})) for t in model["losses"]]


def scaled_terms(recipe: Path, names: Sequence[str]) -> bool:
    """Whether a recipe has one of these loss terms without a target, so that its coefficient is free."""
    found = terms_of(read_recipe(str(recipe))["model"])
    return any(name in names and arguments.get("target") is None for name, arguments in found)


def sized(
    recipe: Path,
    size: Size,
    scale: Sequence[str] = (),
    strength: float = 1.0,
    normaliser: Mapping[str, Any] | None = None,
) -> tuple[SAE, list[LossTerm]]:
    """The SAE of a recipe, built, and its loss terms.

    Latents count as dead after a tenth of the training, and controllers act 200 times in it. ``strength`` multiplies
    the coefficients of the terms named by ``scale``. ``normaliser`` holds the arguments of a
    :class:`mmsae.sae.Normaliser` in place of the recipe's, where all SAEs of a benchmark should see equal rows.
    """
    model = read_recipe(str(recipe))["model"]
    arguments = model["sae"]["init_args"]
    arguments.pop("ratio", None)
    arguments["d_sae"] = size.d_sae
    if normaliser is not None:
        arguments["normaliser"] = {"class_path": "mmsae.sae.Normaliser", "init_args": dict(normaliser)}
    if len(arguments.get("modalities", PAIR)) == 1 or len(size.modalities) == 1:
        arguments["modalities"] = list(size.modalities)
    for part in ("selector", "encoder"):
        inner = arguments.get(part, {}).get("init_args", {})
        name = arguments.get(part, {}).get("class_path", "").rpartition(".")[2]
        for budget in {"k", "steps"} & inner.keys():
            inner[budget] = size.k if name in FRACTIONAL else math.ceil(size.k)
            while name == "GroupMax" and size.d_sae % inner[budget]:  # groups are of equal size
                inner[budget] += 1
        if "every" in inner:
            inner["every"] = max(1, size.steps // 200)
    for name, inner in terms_of(model):
        if inner.get("target") is not None:
            inner["target"] = size.k
        elif name in scale and strength != 1.0:
            term = instantiate({"class_path": f"mmsae.sae.{name}", "init_args": inner})
            inner["coefficient"] = term.coefficient * strength
        if name in ("AuxK", "AuxZipf"):
            inner["dead_after"] = max(1, size.steps * size.rows // 10)
    sae = instantiate(model["sae"])
    sae.build(size.width)
    return sae, instantiate(model["losses"])


def fit(
    recipe: Path,
    size: Size,
    x: Mapping[str, Tensor],
    lr: float,
    seed: int,
    *,
    scale: Sequence[str] = (),
    strength: float = 1.0,
    control: str = "",
    normaliser: Mapping[str, Any] | None = None,
    one_bias: bool = False,
) -> SAE:
    """The SAE of a recipe, trained on ``x {modality: (N, d)}``, of which row i of each modality is a pair.

    ``control`` is one of :data:`CONTROLS`, or empty. With ``one_bias`` all dictionaries have one bias in common,
    which starts at the mean of theirs. The other arguments are those of :func:`sized`.
    """
    torch.manual_seed(seed)
    sae, losses = sized(recipe, size, scale, strength, normaliser)
    sae.fit_normaliser(x)
    if one_bias:
        _share_bias_(sae)
    freeze = CONTROLS[control] if control else ""
    if freeze is not None:
        train(sae, losses, _batches(x, size.rows, seed), size.steps, lr, seed, warm_flat_fall, freeze)
    return sae.eval()


@torch.no_grad()
def _share_bias_(sae: SAE) -> None:
    biased = [d for d in sae.dictionaries.values() if d.bias is not None]
    if biased:
        biased[0].bias.copy_(torch.stack([d.bias for d in biased]).mean(0))
    for dictionary in biased[1:]:
        dictionary.bias = biased[0].bias


def warm_flat_fall(step: int, steps: int) -> float:
    """Factor of the learning rate: up over 50 steps, flat, down to 0 over the last three tenths."""
    return min(1.0, (step + 1) / 50, (1 - step / steps) / 0.3)


def _batches(x: Mapping[str, Tensor], rows: int, seed: int) -> Iterator[dict[str, Tensor]]:
    generator, n = torch.Generator().manual_seed(seed), len(next(iter(x.values())))
    while True:
        drawn = torch.randint(n, (rows,), generator=generator)
        yield {m: v[drawn] for m, v in x.items()}
