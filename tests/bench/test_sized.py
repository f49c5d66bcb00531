"""Recipes at another size say what they said, but for the sizes."""

import pytest
import torch

from mmsae.bench.sized import (
    CONTROLS,
    SPARSITY,
    Size,
    centres,
    fit,
    modalities_of,
    sae_recipes,
    scaled_terms,
    sized,
    warm_flat_fall,
)
from mmsae.metrics.reconstruction import fvu

SIZE = Size(width=12, d_sae=20, k=2.5, modalities=("image", "text"), steps=400, rows=50)


@pytest.mark.parametrize("name", sae_recipes())
def test_every_recipe_is_built_at_a_size(name):
    sae, losses = sized(sae_recipes()[name], SIZE)
    assert sae.d_sae == 20 and set(sae.d_in.values()) == {12} and set(sae.modalities) == {"image", "text"} and losses
    for term in losses:
        term.check(sae)


def test_budgets_bounds_and_strengths():
    recipes = sae_recipes()
    assert sized(recipes["topk"], SIZE)[0].selector.k == 3 and sized(recipes["batch_topk"], SIZE)[0].selector.k == 2.5
    assert {t.name: t for t in sized(recipes["topk"], SIZE)[1]}["auxk"].dead_after == 2000
    plain, tripled = (
        {t.name: t for t in sized(recipes["paired_topk"], SIZE, ("CodeCosine",), s)[1]} for s in (1.0, 3.0)
    )
    assert tripled["code_cosine"].coefficient == pytest.approx(3 * plain["code_cosine"].coefficient)
    assert scaled_terms(recipes["relu_l1"], SPARSITY) and not scaled_terms(recipes["jumprelu"], SPARSITY)
    assert modalities_of(recipes["topk"]) == ("image",) and modalities_of(recipes["paired_topk"]) == ("image", "text")


def test_a_normaliser_stands_in_for_the_recipe_s():
    sae, _ = sized(sae_recipes()["topk"], SIZE, normaliser={"centre": True, "scale": "rms"})
    assert sae.normaliser.centre and sae.normaliser.scale == "rms"
    assert not sized(sae_recipes()["topk"], SIZE)[0].normaliser.centre
    for path in sae_recipes().values():
        assert centres(path) == sized(path, SIZE)[0].normaliser.centre


def test_fit_trains_on_rows_and_controls_keep_what_they_freeze():
    x = {"image": torch.randn(300, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(4, 12)}
    size = Size(width=12, d_sae=20, k=2, modalities=("image",), steps=60, rows=50)
    made = {c: fit(sae_recipes()["topk"], size, x, 1e-2, 3, control=c) for c in ("", *CONTROLS)}
    again = fit(sae_recipes()["topk"], size, x, 1e-2, 3)
    atoms = {c: sae.dictionary("image").rows() for c, sae in made.items()}
    assert torch.equal(atoms[""], again.dictionary("image").rows()) and not made[""].training
    assert torch.equal(atoms["decoder frozen"], atoms["untrained"]) and not torch.equal(atoms[""], atoms["untrained"])
    error = {c: fvu(sae.decode(sae.encode(x["image"], "image"), "image"), x["image"]) for c, sae in made.items()}
    assert error[""] == min(error.values()) and error["untrained"] == max(error.values())


def test_the_rate_rises_stays_and_falls():
    assert [round(warm_flat_fall(step, 1000), 3) for step in (0, 49, 700, 850, 999)] == [0.02, 1, 1, 0.5, 0.003]


def test_one_bias_is_shared_and_starts_between_the_means():
    generator = torch.Generator().manual_seed(0)
    x = {m: torch.randn(300, 12, generator=generator) + shift for m, shift in (("image", 3.0), ("text", -1.0))}
    size = Size(width=12, d_sae=20, k=2, modalities=("image", "text"), steps=30, rows=50)

    def biases(control="", **how):
        how |= {"normaliser": {}, "control": control}
        sae = fit(sae_recipes()["paired_topk"], size, x, 1e-2, 3, **how)
        return [sae.dictionary(m).bias.detach() for m in ("image", "text")]

    image, text = biases("untrained", one_bias=True)
    assert image is not text and torch.equal(image, text) and torch.allclose(image, torch.ones(12), atol=0.3)
    image, text = biases(one_bias=True)
    assert torch.equal(image, text)
    image, text = biases()
    assert (image - text).min() > 2
