"""benchmarks/intruders.py: codes of an SAE of one's own are read as evidence is, and settings are told apart."""

import numpy as np

from benchmarks.intruders import SETTINGS, Coded, Setting, row, whitened
from mmsae.bench.names.measure import by_concepts, intruders, meaning
from mmsae.interpret.evidence.folder import Evidence
from tests.helpers.interpret import planted


def test_codes_are_read_as_evidence_is(tmp_path):
    ev = Evidence(planted(tmp_path / "e", n=600, embeddings={}))
    z = ev.codes("image").matrix().toarray()
    own, truth = Coded(ev, z), np.stack([z[:, j] > 0 for j in range(8)], 1)
    assert own.live() == list(range(40))  # the last one never fires
    np.testing.assert_array_equal(meaning(own, truth).f1, meaning(ev, truth).f1)
    judge = by_concepts(truth)
    np.testing.assert_array_equal(intruders(own, range(12), judge), intruders(ev, range(12), judge))


def test_what_is_read_in_another_way_is_trained_once_and_all_else_apart():
    trained = {name: s.trained for name, s in SETTINGS.items()}
    same = {name for name, folder in trained.items() if folder == Setting().trained}
    assert same == {n for n, s in SETTINGS.items() if s._replace(threshold=False, floor=0.0) == Setting()}
    assert len(set(trained.values())) == len({(str(s.selector), s.steps, s.d_sae) for s in SETTINGS.values()})


def test_a_row_is_the_mean_over_latents_of_all_seeds():
    strong, weak = [[1.0] * 5 + [0.0] * 5], [[0.5] * 5 + [None] * 5, [0.5] * 10]
    counts = {"live": 1, "clear": 1, "concepts": 1, "l0": 8.0, "random l0": 7.0, "random sets": [[0.2] * 10]}
    got = row("x", [counts | {"sets": strong}, counts | {"sets": weak, "l0": 6.0}])
    assert got == ["x", "7.0", "1 + 1", "1 + 1", "1 + 1", "0.667", "0.500", "0.200", "7.0"]


def test_whitened_directions_are_as_wide_whatever_the_activations_are():
    """Eight a row, and equal for activations that are stretched."""
    x = np.random.default_rng(0).normal(size=(400, 6))
    z = whitened(x, np.random.default_rng(1), 40)
    assert ((z > 0).sum(1) == 8).all()
    wide = x * [9, 1, 1, 1, 1, 0.1]
    gram = [np.corrcoef(whitened(y, np.random.default_rng(1), 4000, 2000)) for y in (x, wide)]
    np.testing.assert_allclose(*gram, atol=0.1)
