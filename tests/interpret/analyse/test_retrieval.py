"""Items by their properties: the dense ways by hand, truth, and judgements."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from mmsae.interpret.analyse.retrieval import (
    CONCEPTS,
    HELD,
    concept_scores,
    dense_scores,
    held_then_dense,
    judge,
    phrase,
    true_of,
)
from mmsae.metrics.concepts.inverted import InvertedLists
from mmsae.metrics.concepts.query import parse
from mmsae.types import InputError


def test_words():
    assert phrase(parse("red & ~circle")) == "red and not circle"
    assert phrase(parse('"red*" | (blue & ~"big dog")')) == "red or blue and not big dog"
    with pytest.raises(InputError, match="#1 has no words"):
        phrase(parse("red & #1"))


def test_dense_ways_by_hand():
    images = np.eye(3)[[0, 1, 2, 0]] * 1.0
    images[3] = [0.6, 0.8, 0]
    space = {"red": [1, 0, 0], "circle": [0, 1, 0], "red and not circle": [0, 0, 1]}
    found = dense_scores(parse("red & ~circle"), images, lambda texts: np.array([space[t] for t in texts], float))
    assert found["dense phrase"].tolist() == [0, 0, 1, 0]
    assert found["dense sum"] == pytest.approx([1, -1, 0, -0.2])
    # percentiles of red: 1 .5 .5 .75; of circle: .5 1 .5 .75
    assert found["dense logic"].tolist() == [0.5, 0, 0.5, 0.25]


def test_both_ways_by_concepts():
    """A red square with little red, and a red circle with little circle: only the first fits "red & ~circle"."""
    codes = {"image": InvertedLists.of(csr_matrix(np.array([[1.0, 0], [3, 1], [2, 4], [0, 0]])))}
    scores, holds = concept_scores(parse("#0 & ~#1"), codes)
    assert holds.tolist() == [True, False, False, False]
    assert scores[CONCEPTS] == pytest.approx([1 / 3, 0.5, 0, 0], abs=1e-6)
    assert scores[HELD] == pytest.approx([2 / 3, 0.25, 0, 0], abs=1e-6)


def test_both_together():
    score = held_then_dense(np.array([False, True, False, True]), np.array([0.9, 0.1, 0.2, 0.8]))
    assert np.argsort(-score).tolist() == [3, 1, 0, 2]


def test_truth():
    attributes = [["red", "circle"], ["red"], ["blue"], []]
    assert true_of(parse("red & ~circle"), attributes).tolist() == [False, True, False, False]
    assert true_of(parse("image:Red | blue"), attributes).tolist() == [True, True, True, False]
    assert true_of(parse("~red"), attributes).tolist() == [False, False, True, True]
    with pytest.raises(
        InputError, match=r"green.* asks for what no item's truth has; of 3 it has blue, circle, red: word"
    ):
        true_of(parse("green"), attributes)
    with pytest.raises(InputError, match="truth knows names alone"):
        true_of(parse("#1"), attributes)


def test_judgement():
    rng = np.random.default_rng(0)
    wanted = rng.random(300) < 0.2
    scores = {CONCEPTS: wanted * 1.0, "dense sum": wanted + rng.normal(size=300)}
    found = judge(scores, wanted, k=10, draws=100)
    assert found[CONCEPTS]["average_precision"] == {"value": 1, "low": 1, "high": 1}
    dense = found["dense sum"]
    assert dense["average_precision"]["low"] < dense["average_precision"]["value"] < dense["average_precision"]["high"]
    above = dense["concepts_above"]
    assert (
        above["value"] == pytest.approx(1 - dense["average_precision"]["value"]) and 0 < above["low"] < above["value"]
    )
    assert judge(scores, wanted, k=10, draws=100) == found
