"""Soft-WPMI beside numbers worked out by hand, the published loop, and one block beside many."""

import math

import numpy as np
import pytest

from mmsae.interpret.evidence.folder import SparseRows
from mmsae.interpret.names import wpmi as module
from mmsae.interpret.names.wpmi import log_likelihood, strongest, wpmi_scores


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def lists_of(z):
    latent, item = z.T.nonzero()
    start = np.searchsorted(latent, np.arange(z.shape[1] + 1))
    return SparseRows(start, item.astype(np.int32), z[item, latent].astype(np.float32), len(z))


def published(z, e, t, k, a=10, lam=1.0, p=(0.998, 0.97)):
    """CLIP-Dissect's loop over units, similarity.py of its repository."""
    s = a * e @ t.T
    chance = np.exp(s - s.max(1, keepdims=True))
    chance /= chance.sum(1, keepdims=True)
    member = p[0] - np.arange(k) / k * (p[0] - p[1])
    rows = []
    for unit_ in z.T:
        best = np.argsort(-unit_, kind="stable")[:k]
        rows.append(np.log(1 + member[:, None] * (chance[best] - 1) + 1e-7).sum(0))
    rows = np.stack(rows)
    top = rows.max(0)
    prior = top + np.log(np.exp(rows - top).sum(0)) - math.log(len(rows))
    return rows - lam * prior


def test_two_items_and_two_words_by_hand():
    e, t = np.eye(2), np.eye(2)
    got = log_likelihood(np.array([[0, 1]]), e, t, p=(0.9, 0.5))  # p of the two items: .9 and .7
    high, low = 1 / (1 + math.exp(-10)), 1 / (1 + math.exp(10))
    want = math.log(1 + 0.9 * (high - 1) + 1e-7) + math.log(1 + 0.7 * (low - 1) + 1e-7)
    assert got[0, 0] == pytest.approx(want, rel=1e-5)


def test_it_is_the_published_number_where_every_latent_fires_on_k_items(monkeypatch):
    rng = np.random.default_rng(0)
    z, e, t = rng.uniform(0.1, 1, (60, 7)), unit(rng.normal(size=(60, 5))), unit(rng.normal(size=(9, 5)))
    want = published(z, e, t, 20)
    top = strongest(lists_of(z), np.ones(60, bool), 20)
    for gathered in (2**26, 20 * 9 * 2):
        monkeypatch.setattr(module, "GATHERED", gathered)
        table = wpmi_scores(top, np.arange(7), list("abcdefghi"), e.astype(np.float32), t)
        assert np.allclose(table.block(0, 7), want, atol=1e-4)
        assert np.allclose(table.block(2, 5), want[2:5], atol=1e-4)


def test_rare_latents_are_not_padded_and_the_strongest_are_of_kept_items(monkeypatch):
    rng = np.random.default_rng(1)
    z = rng.uniform(0.1, 1, (50, 6)) * (rng.random((50, 6)) < 0.5) * rng.choice([-1, 1], (50, 6))
    z[:, 3] = 0
    z[:2, 4], z[2:, 4] = 1, 0
    keep = np.arange(50) % 3 > 0
    want = np.full((6, 8), -1)
    for j in range(6):
        on = np.flatnonzero(keep & (z[:, j] != 0))
        on = on[np.argsort(-np.abs(z[on, j].astype(np.float32)), kind="stable")][:8]
        want[j, : len(on)] = on
    for entries in (4_000_000, 10):
        monkeypatch.setattr(module, "ENTRIES", entries)
        assert (strongest(lists_of(z), keep, 8) == want).all()
    e, t = unit(rng.normal(size=(50, 5))), unit(rng.normal(size=(4, 5)))
    few = log_likelihood(np.array([[3, 7, -1, -1]]), e, t, p=(0.9, 0.9))
    many = log_likelihood(np.array([[3, 7, 3, 7]]), e, t, p=(0.9, 0.9))
    assert np.allclose(few, many, atol=1e-5)  # scaled up to K
