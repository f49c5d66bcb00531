"""Scores by embeddings on planted and random latents (oracles O2 and O3)."""

import numpy as np
import pytest

from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scores import vectors as module
from mmsae.interpret.scores.subjects import Names, Subjects, misplaced
from mmsae.interpret.scores.vectors import (
    example_scores,
    farthest,
    intruder_scores,
    intruder_sets,
    mean_vectors,
    name_scores,
)
from tests.helpers.interpret import WORDS, ToyEmbedder, planted


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    ev = Evidence(planted(tmp_path_factory.mktemp("vectors") / "e", n=1200))
    names = Names(np.arange(40), [*WORDS, *(WORDS * 4)], np.arange(40) < 8)
    return Subjects(ev, "image", names)


def near_chance(s, rows):
    """Whether the mean over latents is at chance within four standard errors."""
    v = s.value[rows]
    return abs(np.nanmean(v) - s.chance) < 4 * np.nanstd(v) / np.sqrt((~np.isnan(v)).sum())


def test_items_are_unseen_and_shuffled_names_are_others(subjects):
    half = subjects.ev.items.half
    assert (half[subjects.positive[subjects.positive >= 0]] == "test").all()
    assert (half[subjects.seen[0][subjects.seen[0] >= 0]] == "train").all()
    other = subjects.shuffled(0)
    assert other.control == "shuffled" and sorted(other.names.phrases) == sorted(subjects.names.phrases)
    assert all(a != b for a, b in zip(other.names.phrases, subjects.names.phrases, strict=True))
    assert (
        misplaced(["a", "a", "a", "b"], 0).count("a") == 3 and misplaced([], 0) == [] and misplaced(["a"], 0) == ["a"]
    )
    some = subjects.some(10, 0)
    assert len(some.latents) == 10 and some.names.held.sum() == 8 and (some.some(0, 0).latents == some.latents).all()


def test_latents_for_which_there_is_no_other_name_are_no_control(subjects):
    """Their score with "the name of another" would be that of their own."""
    names = Names(np.arange(5), ["a", "a", "a", "b", "c"], np.ones(5, bool))
    other = Subjects(subjects.ev, "image", names).shuffled(0)
    own = dict(zip(names.latents.tolist(), names.phrases, strict=True))
    assert len(other.latents) == 4 and (np.diff(other.latents) > 0).all()
    assert all(own[j] != said for j, said in zip(other.latents.tolist(), other.names.phrases, strict=True))
    alike = Subjects(subjects.ev, "image", Names(np.arange(3), ["a"] * 3, np.ones(3, bool)))
    assert len(alike.shuffled(0).latents) == 0


def test_items_that_are_dealt_at_random_are_at_chance_for_any_judge(subjects):
    dealt, e = subjects.dealt(0), subjects.ev.embeddings("image")
    own, new = (np.concatenate([s.positive, s.negative], 1) for s in (subjects, dealt))
    assert sorted(own.ravel()) == sorted(new.ravel()) and ((own < 0) == (new < 0)).all() and (own != new).any()
    assert dealt.control == "dealt" and near_chance(example_scores(dealt, e), slice(8))
    assert near_chance(intruder_scores(dealt, lambda sets: farthest(sets, e), 5, 40, 0), slice(8))
    some = dealt.rows(np.array([2, 5]))
    assert (some.positive == dealt.positive[[2, 5]]).all() and (some.negative == dealt.negative[[2, 5]]).all()


def test_names_of_planted_latents_score_high_others_at_chance(subjects):
    e = subjects.ev.embeddings("image")
    real = name_scores(subjects, e, ToyEmbedder().phrases(subjects.names.phrases))
    assert (real.value[:8] > 0.95).all() and near_chance(real, slice(8, None))
    other = subjects.shuffled(0)
    assert near_chance(name_scores(other, e, ToyEmbedder().phrases(other.names.phrases)), slice(None))


def test_examples_and_intruders_need_no_names(subjects):
    e = subjects.ev.embeddings("image")
    s = example_scores(subjects, e)
    assert (s.value[:8] > 0.9).all() and near_chance(s, slice(8, None))
    s = intruder_scores(subjects, lambda sets: farthest(sets, e), 5, 40, 0)
    assert s.chance == 0.2 and (s.value[:8] > 0.6).all() and near_chance(s, slice(8, None)) and (s.n == 40).all()
    truth = np.zeros((subjects.ev.n, 8), np.float32)
    for j in range(8):
        item, _ = subjects.ev.lists("image").row(j)
        truth[item, j] = 1
    own = subjects.rows(np.arange(8))

    def knows(sets):
        return np.stack([truth[rows, j].argmin(1) for j, rows in enumerate(sets)])

    assert (intruder_scores(own, knows).value == 1).all()
    abstains = intruder_scores(own, lambda sets: np.full(sets.shape[:2], -1))
    assert (abstains.n == 0).all() and np.isnan(abstains.value).all()


@pytest.mark.parametrize("gathered", [2**25, 3])
def test_the_odd_one_and_means_equal_loops(monkeypatch, gathered):
    monkeypatch.setattr(module, "GATHERED", gathered)
    rng = np.random.default_rng(0)
    e, sets = rng.normal(size=(30, 4)), rng.integers(0, 30, (3, 2, 5))
    got = farthest(sets, e.astype(np.float32))
    for i, trial in np.ndindex(3, 2):
        rows = e[sets[i, trial]]
        cosine = rows @ rows.T
        assert got[i, trial] == (cosine.sum(1) - np.diag(cosine)).argmin()
    items = np.array([[1, 2, -1], [-1, -1, -1]])
    assert np.allclose(mean_vectors(items, e), [e[[1, 2]].mean(0), np.zeros(4)], atol=1e-6)


def test_sets_hold_neighbours_in_strength_and_one_negative():
    positive, negative = np.arange(20)[None].repeat(3, 0), np.arange(100, 110)[None].repeat(3, 0)
    positive[1, 3:], negative[2] = -1, -1
    sets, odd = intruder_sets(positive, negative, 5, 50, 0)
    assert (sets[1:] == -1).all()  # three positives are too few, no negative is none
    assert (np.take_along_axis(sets[0], odd[0][:, None], 1) >= 100).all() and len(set(odd[0])) == 5
    own = np.sort(sets[0], 1)[:, :4]
    assert (own[:, 3] - own[:, 0] == 3).all() and (own < 20).all() and len(set(own[:, 0])) > 5
    again = intruder_sets(positive, negative, 5, 50, 0)[0]
    assert (again == sets).all()
    assert (intruder_sets(positive[:, :2], negative, 5, 3, 0)[0] == -1).all()
