"""The head of the error on activations in memory, and what the page makes of it."""

from types import SimpleNamespace

import pytest
import torch

from mmsae import SAE
from mmsae.evaluation.card.codes import error
from mmsae.evaluation.card.page import figures_of, tables_of
from mmsae.evaluation.features import encode_features
from mmsae.evaluation.rows import find
from mmsae.evaluation.suite import NotApplicable
from mmsae.metrics import ErrorDecomposition
from mmsae.sae import TopK, random_control
from tests.helpers.recipes import atoms_rows

D = 16


def suite_data(n=600, token_site=False):
    torch.manual_seed(0)
    sae = SAE(D, 48, modalities=["image"], selector=TopK(4))
    rows = {name: atoms_rows(m, D, seed=i) for i, (name, m) in enumerate({"train": n, "test": 300}.items())}
    sae.fit_normaliser({"image": rows["train"]})
    features = {name: encode_features(sae.eval(), x) for name, x in rows.items()}
    return SimpleNamespace(
        sae=sae, random=random_control(sae, 1), features=features.__getitem__, token_site=lambda: token_site
    )


def test_rows_are_the_decompositions_figures_beside_controls():
    data = suite_data()
    rows = error(data, pursuit="gp").rows
    train, test = data.features("train"), data.features("test")
    for (features, control), sae in {("recon", ""): data.sae, ("recon", "random"): data.random}.items():
        want = ErrorDecomposition(sae, "image").fit(train.x).evaluate(test.x)
        own = {r["score"]: r["value"] for r in find(rows, features=features, control=control)}
        assert own["predictable"] == want.r2 and own["nonlinear fvu"] == want.fvu_nonlinear
        assert own["fvu"] == pytest.approx(data.features("test").fvu if not control else want.fvu)
    fvu = {r["features"]: r["value"] for r in find(rows, score="fvu", control="")}
    assert fvu["recon, gp at its own L0"] < fvu["recon"]
    assert {r["fitted_on"] for r in error(data, rows=400).rows} == {400}
    (table, *_) = tables_of(rows)
    assert ["recon", "recon (random)", "recon, gp at its own L0"] == [r[0] for r in table.rows]
    (chart,) = figures_of("error", rows, {})
    assert "of nonlinear, linear by recon, recon (random)" in chart.html


def test_where_it_cannot_be_fitted_it_says_why():
    with pytest.raises(NotApplicable, match="width 16 needs 320 training images, not 300"):
        error(suite_data(300))
    with pytest.raises(NotApplicable, match="tokens"):
        error(suite_data(token_site=True))
