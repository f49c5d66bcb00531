import numpy as np
import pytest

from mmsae.interpret.browser.layout import layout
from mmsae.types import InputError


@pytest.fixture(scope="module")
def clusters():
    rng = np.random.default_rng(0)
    centre = np.repeat(rng.normal(size=(3, 8)), 20, 0)
    return centre + 0.05 * rng.normal(size=(60, 8)), np.repeat(np.arange(3), 20)


@pytest.mark.parametrize("kind", ["pca", "tsne"])
def test_what_is_alike_lies_together(clusters, kind):
    atoms, group = clusters
    living = np.arange(60) % 10 > 0
    place, how = layout(atoms, living, kind, 0)
    assert how == kind and np.isnan(place[~living]).all() and (np.abs(place[living]) <= 1.1).all()
    distance = np.linalg.norm(place[living][:, None] - place[living][None], axis=2) + 9 * np.eye(living.sum())
    assert (group[living][distance.argmin(1)] == group[living]).all()
    assert np.array_equal(layout(atoms, living, kind, 0)[0], place, equal_nan=True)


def test_auto_and_what_cannot_be_laid_out(clusters, monkeypatch):
    atoms, _ = clusters
    assert layout(atoms, np.ones(60, bool), "auto", 0)[1] == "tsne"
    monkeypatch.setattr("mmsae.interpret.browser.layout.TSNE_LIMIT", 10)
    assert layout(atoms, np.ones(60, bool), "auto", 0)[1] == "pca"
    assert layout(atoms, np.arange(60) < 2, "auto", 0)[1] == "none"
    monkeypatch.setattr("mmsae.interpret.browser.layout.find_spec", lambda name: None)
    with pytest.raises(InputError, match="umap-learn, which is not installed"):
        layout(atoms, np.ones(60, bool), "umap", 0)
