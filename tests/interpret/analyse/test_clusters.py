"""Groups of items: planted ones are found by every method, and described by what was planted."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from mmsae.interpret.analyse.clusters import agreement, chosen_latents, cluster
from mmsae.interpret.analyse.corpora import presence
from mmsae.interpret.analyse.options import Clustering
from mmsae.types import InputError

NAMES = {0: "red circle", 1: "red square", 2: "blue", 3: "noise"}


@pytest.fixture(scope="module")
def planted():
    """Three groups of 90, 60 and 30 items with two latents each, and 10 items with nothing."""
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2, -1], [90, 60, 30, 10])
    z = np.zeros((190, 10))
    for g in range(3):
        z[np.ix_(truth == g, [2 * g, 2 * g + 1])] = 1 + rng.random(((truth == g).sum(), 2))
    noise = (rng.random((190, 10)) < 0.05) * 0.2
    z[truth >= 0] += noise[truth >= 0]
    order = rng.permutation(190)
    z[:, 0] *= 100  # the scale of a latent does not matter
    codes = csr_matrix(z[order])
    return codes, presence([codes])[0], truth[order]


WAYS = [
    ("kmeans", "l2"),
    ("agglomerative", "l2"),
    ("agglomerative", "jaccard"),
    ("spectral", "jaccard"),
    ("spectral", "l2"),
]


@pytest.mark.parametrize(("method", "metric"), WAYS)
@pytest.mark.parametrize("items", [4000, 100])
def test_planted_groups_are_found(planted, method, metric, items):
    codes, present, truth = planted
    given = Clustering(clusters=3, method=method, metric=metric, items=items)
    found = cluster(codes, present, np.arange(6), given)
    assert (found.of == -1).sum() == (truth == -1).sum() and np.isnan(found.distance[found.of < 0]).all()
    assert (found.of == truth).mean() > 0.97  # the largest is first
    assert np.array_equal(found.of, cluster(codes, present, np.arange(6), given).of)
    described = found.describe(present, NAMES, least=5)
    assert [{d["latent"] for d in c[:2]} for c in described] == [{0, 1}, {2, 3}, {4, 5}]
    first = described[0][0]
    inside = present.toarray()[found.of == 0, first["latent"]].mean()
    assert first["share"] == pytest.approx(inside) and first["name"] in NAMES.values()
    assert first["lift"] == pytest.approx(inside / present.toarray()[:, first["latent"]].mean())


def test_which_concepts(planted):
    _, present, truth = planted
    labels = np.where(truth == 1, "b", "a")

    def chosen(**given):
        return chosen_latents(Clustering(**given), present, labels, NAMES, 20).tolist()

    assert chosen(concepts=("red*", "#4")) == [0, 1, 4]
    assert chosen(label="b") == [2, 3]
    assert set(chosen()) == {0, 1, 2, 3, 4, 5}  # those in 20 items
    for given, says in (
        ({"concepts": ("green",)}, "no latent is named 'green'"),
        ({"concepts": ("#12",)}, "no latent #12: the SAE has 10"),
        ({"concepts": ("#9",)}, "none of the 1 concepts asked for is in at least 20 items"),
        ({"label": "c"}, "no item has the label 'c'"),
        ({"label": "B"}, "there is b"),
        ({"label": "b", "concepts": ("blue",)}, "give one of them"),
    ):
        with pytest.raises(InputError, match=says):
            chosen(**given)


def test_agreement_with_classes(planted):
    _, _, truth = planted
    labels = np.array(["", "x", "y", "z"])[truth + 1].tolist()
    found = agreement(truth, labels)
    assert found["adjusted_rand"] == 1 and found["classes"] == 3 and found["items"] == 180
    assert agreement(truth, [""] * 190) == {}


def test_bad_input(planted):
    codes, present, _ = planted
    with pytest.raises(InputError, match="kmeans has means of values"):
        cluster(codes, present, np.arange(6), Clustering(metric="jaccard"))
    with pytest.raises(InputError, match="500 clusters are asked for, of 180 items"):
        cluster(codes, present, np.arange(6), Clustering(clusters=500))
