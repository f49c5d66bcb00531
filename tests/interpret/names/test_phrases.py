"""The best phrases of latents from blocks of scores: against the whole table, with hubs and without."""

import numpy as np
import pytest

from mmsae.interpret.names import phrases as module
from mmsae.interpret.names.phrases import PhraseScores, best_phrases, csls


def table(s):
    return PhraseScores(np.arange(len(s)) + 10, [f"w{v}" for v in range(s.shape[1])], lambda lo, hi: s[lo:hi])


def test_csls_equals_its_formula_by_hand(monkeypatch):
    monkeypatch.setattr(module, "NEAREST", 2)
    s = np.array([[0.9, 0.5, 0.1], [0.8, 0.2, 0.4]], np.float32)
    near = np.array([0.85, 0.35, 0.25])  # means over both latents
    want = [
        [1.8 - 0.7 - 0.85, 1.0 - 0.7 - 0.35, 0.2 - 0.7 - 0.25],
        [1.6 - 0.6 - 0.85, 0.4 - 0.6 - 0.35, 0.8 - 0.6 - 0.25],
    ]
    assert np.allclose(csls(s, near), want, atol=1e-6)


@pytest.mark.parametrize("hubs", ["csls", "z", "none"])
def test_blocks_give_what_the_whole_table_gives(monkeypatch, hubs):
    s = np.random.default_rng(0).normal(50, 1, (37, 29)).astype(np.float32)
    whole = best_phrases(table(s), 3, hubs)
    middle = np.median(s, 0)
    z = (s - middle) / (1.4826 * np.median(np.abs(s - middle), 0))
    rank = {"none": s, "z": z, "csls": csls(s, np.sort(s, 0)[-10:].mean(0)) / 2}[hubs]
    order = np.argsort(-rank, 1)
    assert (whole.phrase == order[:, :3]).all() and (whole.latents == np.arange(37) + 10).all()
    assert np.allclose(whole.z, np.take_along_axis(z, order[:, :3], 1), atol=1e-3)
    sorted_rank = -np.sort(-rank, 1)
    assert np.allclose(whole.margin, sorted_rank[:, :3] - sorted_rank[:, 1:4], atol=1e-4)
    monkeypatch.setattr(module, "MEMORY", 29 * 5)  # nothing is kept, five rows at a time
    calls = []
    again = best_phrases(PhraseScores(np.arange(37) + 10, ["w"] * 29, lambda lo, hi: calls.append(hi - lo) or s[lo:hi]),
                         3, hubs)  # fmt: skip
    assert max(calls) <= 29 * 5 // 29 and (again.phrase == whole.phrase).all()
    assert np.allclose(again.z, whole.z, atol=1e-5)


def test_a_hub_word_wins_everywhere_until_it_is_corrected():
    s = np.random.default_rng(0).normal(0.1, 0.01, (12, 13)).astype(np.float32)
    s[np.arange(12), np.arange(12)] = 0.6
    s[:, 12] += 0.6  # "photo"
    assert (best_phrases(table(s), 1, "none").phrase[:, 0] == 12).all()
    for hubs in ("csls", "z"):
        assert (best_phrases(table(s), 1, hubs).phrase[:, 0] == np.arange(12)).all()
    best = best_phrases(table(s), 1, "csls")
    assert (best.z[:, 0] > 3).all() and (best.margin[:, 0] > 0).all()


def test_one_phrase_one_latent_and_none():
    one = best_phrases(table(np.array([[0.5], [0.1], [0.2]], np.float32)), 3)
    assert one.phrase.shape == (3, 1) and np.isnan(one.margin).all()
    assert one.z[0, 0] == pytest.approx(0.3 / (1.4826 * 0.1), rel=1e-5) and one.z[2, 0] == 0
    alone = best_phrases(table(np.array([[0.5, 0.2]], np.float32)), 3)
    assert alone.phrase.tolist() == [[0, 1]] and np.isnan(alone.z).all()
    none = best_phrases(PhraseScores(np.zeros(0, int), ["a"], lambda lo, hi: np.zeros((0, 1), np.float32)), 3)
    assert none.phrase.shape == (0, 1)


def test_ties_go_by_the_place_of_the_phrase():
    assert best_phrases(table(np.ones((3, 5), np.float32)), 2, "none").phrase.tolist() == [[0, 1]] * 3


def test_meanings_that_several_latents_share_are_found_and_medians_come_from_a_sample(monkeypatch):
    rng = np.random.default_rng(0)
    s = rng.normal(0, 0.1, (60, 4)).astype(np.float32)
    s[:12, 0] += 1  # one in five means the same: a plain z-score is at most sqrt(48 / 12) = 2
    plain = (s[:12, 0] - s[:, 0].mean()) / s[:, 0].std()
    assert plain.max() < 3 and (best_phrases(table(s), 1, "none").z[:12, 0] > 5).all()
    many = rng.normal(0, 0.1, (1000, 4)).astype(np.float32)
    whole = best_phrases(table(many), 1)
    monkeypatch.setattr(module, "SAMPLE", 300)
    assert np.allclose(best_phrases(table(many), 1).z, whole.z, rtol=0.3, atol=0.3)
