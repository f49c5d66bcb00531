"""Recipes at the size of a world."""

from functools import lru_cache

import pytest
import torch

from mmsae.bench.recover.measures import match
from mmsae.bench.recover.models import Variant, WorldRows, figures, model_of, variants
from mmsae.bench.recover.worlds import WORLDS


@pytest.mark.parametrize("name", variants())
def test_every_variant_is_made_at_the_size_of_a_world(name):
    world = WORLDS["two_modalities"](0)
    sae, losses = model_of(variants()[name].recipe, world, 100)
    assert sae.d_sae == world.size and set(sae.d_in) == set(world.atoms) and losses


@pytest.mark.parametrize("world", WORLDS)
def test_no_training_starts_at_the_truth(world):
    """Worlds and weights are drawn from one seed, but not from one sequence of numbers."""
    torch.manual_seed(0)
    made = WORLDS[world](0)
    sae, _ = model_of(variants()["topk"].recipe, made, 100)
    for m, atoms in made.atoms.items():
        assert match(sae.dictionary(m).rows().detach(), atoms, signed=True)[2].mean() < 0.6


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("world", ["downstream", "two_modalities"])
def test_every_variant_that_fits_a_world_is_trained_on_it(name, world):
    variant = variants()[name]
    if not variant.fits(world):
        pytest.skip("needs pairs, or gradients")
    found = figures(variant, small_rows(world), 3)
    assert 0 <= found["cosine"] <= 1 and 0 <= found["precision"] <= 1


def test_a_dictionary_that_is_built_is_built():
    found = figures(variants()["itda"], small_rows("downstream"), 20)
    assert found["fvu"] < 0.5 and found["cosine"] > 0.5


@lru_cache
def small_rows(world):
    return WorldRows.draw(WORLDS[world], 0, train=600, test=1400)


def test_the_budget_is_the_worlds():
    world = WORLDS["hierarchical"](0)
    assert model_of(variants()["topk"].recipe, world, 100)[0].selector.k == 2
    assert model_of(variants()["batch_topk"].recipe, world, 100)[0].selector.k == pytest.approx(1.36)
    terms = [t for t in model_of(variants()["relu_l1"].recipe, world, 100, strength=3.0)[1] if t.name == "l1"]
    assert terms[0].coefficient == pytest.approx(3 * 0.1)


def test_figures_repeat_and_gradients_reach_the_selector():
    rows = WorldRows.draw(WORLDS["downstream"], 0, train=512, test=1400)
    assert next(rows.batches()).grad["image"].shape == next(rows.batches()).x["image"].shape
    variant = Variant(variants()["topk"].recipe)
    first, second = (figures(variant, rows, 20) for _ in range(2))
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}
    assert first["ce"] > first["ce_raw"] > 0
