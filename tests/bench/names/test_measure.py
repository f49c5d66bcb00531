"""What is true of latents, and which names say it."""

import numpy as np
import pytest

from mmsae.bench.names.measure import (
    CLEAR,
    by_concepts,
    by_embeddings,
    figures,
    intruders,
    meaning,
    right,
    says,
)
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.names.job import Naming
from mmsae.interpret.names.options import Holding, Looking
from mmsae.world.generator.scene import CONCEPTS
from tests.helpers.interpret import planted


@pytest.mark.parametrize(
    ("name", "concept", "want"),
    [
        ("red", "red", True), ("dark background", "dark", True), ("on the left", "left", True),
        ("striped red", "red", False),
        ("right of", "left of", True), ("below a", "above", True), ("reddish", "red", False),
        ("left", "left of", False), ("two objects", "two objects", True),
    ],
)  # fmt: skip
def test_what_a_name_says(name, concept, want):
    assert says(name, concept) is want


def test_f1_of_planted_latents_and_figures(tmp_path):
    """Latents 0 to 7 fire where a word is said; the world's concepts stand for the words."""
    ev = Evidence(planted(tmp_path / "e", n=600, embeddings={}))
    fires = ev.codes("image").matrix().toarray() > 0
    truth = np.zeros((600, len(CONCEPTS)), bool)
    truth[:, :8] = fires[:, :8]
    m = meaning(ev, truth)
    assert all(m.f1[j, j] == 1 for j in range(8)) and m.f1[:, 8:].max() < CLEAR
    assert right(CONCEPTS[3], 3, m) and not right(CONCEPTS[4], 3, m)
    naming = Naming(ev, Looking(), Holding(), cache=False)
    found = naming.run()
    names = {j: n._replace(name=CONCEPTS[j]) if j < 8 else n for j, n in found.names.items()}
    names[0] = names[0]._replace(name="wrong")
    live = [list(range(40)), list(range(8, 40))]
    got = figures(m, names, found.candidates, {j: found.names[j] for j in range(8, 40)}, live)
    assert got["clear"] == 8 and got["named_right"] == 7 / 8 and got["named_wrong"] == 1 / 8
    assert got["abstained_random"] == 1 and got["named"] == 8 / 40


def test_a_judge_that_knows_finds_intruders_of_meaningful_latents_alone(tmp_path):
    ev = Evidence(planted(tmp_path / "e", n=1200))
    truth = np.zeros((1200, len(CONCEPTS)), bool)
    truth[:, :8] = ev.codes("image").matrix().toarray()[:, :8] > 0
    judge, e = by_concepts(truth), by_embeddings(ev.embeddings("image"))
    real, random = (intruders(ev, range(*r), judge) for r in ((0, 8), (8, 40)))
    assert real.shape == (8, 10) and np.nanmean(real) > 0.9 and abs(np.nanmean(random) - 0.2) < 0.05
    assert intruders(ev, [], judge).shape == (0, 10) and np.isnan(intruders(ev, [40], judge)).all()
    assert np.nanmean(intruders(ev, range(8), e)) > 0.6 and np.nanmean(intruders(ev, range(8, 40), e)) < 0.3
    for j in (judge, e):
        assert abs(np.nanmean(intruders(ev, range(8), j, dealt=True, each=20)) - 0.2) < 0.05


def test_the_judge_weighs_concepts_by_how_rare_they_are():
    """Four share concept 0, of which the fifth has none; or lack concept 1, which the fifth has."""
    truth = np.zeros((400, 3), bool)
    truth[:100, 0], truth[100:, 1], truth[::2, 2] = True, True, True
    choose = by_concepts(truth)
    assert choose(np.array([[[3, 8, 301, 12, 15], [300, 2, 9, 4, 11]]])).tolist() == [[2, 0]]
    assert choose(np.array([[[200, 301, 250, 50, 205]]])).tolist() == [[3]]
