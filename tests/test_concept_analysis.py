"""What the benchmark of data analysis counts: planted sides, F1 of latents, and when a difference is found first."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from benchmarks.concept_analysis import f1_table, found, planted_sides, two_attribute_queries
from mmsae.metrics.concepts.query import parse
from mmsae.types import InputError


def test_planted_sides_have_their_shares():
    has = np.arange(4000) % 4 == 0
    a, b = planted_sides(has, np.random.default_rng(0), (1500, 1500))
    assert (has[a].mean(), has[b].mean()) == (0.2, 0.05) and len({*a.tolist(), *b.tolist()}) == 3000
    with pytest.raises(InputError, match="300 items with and 1200 without are needed, and 10 and 3990 are left"):
        planted_sides(np.arange(4000) < 10, np.random.default_rng(0), (1500, 1500))


def test_f1_by_hand():
    z, truth = np.array([[1.0, 0], [2, 0], [0, 3], [0, 0]]), np.array([[1, 0], [0, 0], [1, 0], [0, 0]], bool)
    assert f1_table(csr_matrix(z), truth).tolist() == [[0.5, 0], [2 / 3, 0]]


def test_found_first():
    def row(latent, q, leader=None):
        return {"latent": latent, "leader": latent if leader is None else leader, "q": q, "share_a": 1, "share_b": 0}

    best = np.array([5, 5, 7])  # of three latents
    rows = [row(1, 0.01), row(0, 0.02, leader=1), row(2, 0.5)]
    got = found(rows, best, concept=5, own=0)
    assert (got["first"], got["first_is_it"], got["rank_of_best_latent"], got["differences"]) == (1, True, 2, 1)
    assert not found(rows, best, concept=7, own=2)["first_is_it"]
    none = found([row(2, 0.5)], best, concept=7, own=0)
    assert (none["first"], none["first_is_it"], none["rank_of_best_latent"]) == (None, False, None)


def test_queries_are_of_two_different_kinds():
    queries = two_attribute_queries()
    assert len(set(queries)) == 40 == len([parse(q) for q in queries]) and queries == two_attribute_queries()
