"""Recipes at another size say what they said, but for the sizes."""

import pytest

from mmsae.bench.sized import SPARSITY, Size, modalities_of, sae_recipes, scaled_terms, sized

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
