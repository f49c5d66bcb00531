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
    both = ("image", "text")
    sae = SAE(D, 48, modalities=both, selector=TopK(4))
    sizes = {"train": n, "test": 300}
    rows = {
        (s, m): atoms_rows(k, D, seed=i) + 0.1 * (m == "text") for m in both for i, (s, k) in enumerate(sizes.items())
    }
    sae.fit_normaliser({m: rows["train", m] for m in both})
    features = {(s, m): encode_features(sae.eval(), x, modality=m) for (s, m), x in rows.items()}
    return SimpleNamespace(
        sae=sae, random=random_control(sae, 1), features=lambda s, m="image": features[s, m],
        token_site=lambda m: token_site, host=SimpleNamespace(modalities=both),
    )  # fmt: skip


def test_rows_are_the_decompositions_figures_beside_controls():
    data = suite_data()
    rows = error(data, pursuit="gp").rows
    for m, name in (("image", "test"), ("text", "test text")):
        train, test = data.features("train", m), data.features("test", m)
        for (features, control), sae in {("recon", ""): data.sae, ("recon", "random"): data.random}.items():
            want = ErrorDecomposition(sae, m).fit(train.x).evaluate(test.x)
            own = {r["score"]: r["value"] for r in find(rows, set=name, features=features, control=control)}
            assert own["predictable"] == want.r2 and own["nonlinear fvu"] == want.fvu_nonlinear
            assert own["fvu"] == pytest.approx(want.fvu if control else test.fvu)
    fvu = {r["features"]: r["value"] for r in find(rows, set="test", score="fvu", control="")}
    assert fvu["recon, gp at its own L0"] < fvu["recon"]
    assert {r["fitted_on"] for r in error(data, rows=400).rows} == {400}
    names = ["recon", "recon (random)", "recon, gp at its own L0"]
    assert all([r[0] for r in table.rows] == names for table in tables_of(rows))
    charts = figures_of("error", rows, {})
    assert [c.caption.split(":")[0] for c in charts] == ["test", "test text"]
    assert all("of nonlinear, linear by recon, recon (random)" in c.html for c in charts)


def test_where_it_cannot_be_fitted_it_says_why():
    with pytest.raises(NotApplicable, match="width 16 needs 320 training images, not 300"):
        error(suite_data(300))
    with pytest.raises(NotApplicable, match="needs 320 training images, not 100"):
        error(suite_data(), rows=100)
    with pytest.raises(NotApplicable, match="tokens"):
        error(suite_data(token_site=True))
