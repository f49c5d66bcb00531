from itertools import pairwise

import numpy as np
import pytest

from mmsae.interpret.evidence.corpus import CorpusItems
from mmsae.interpret.evidence.lists import RankedBlock, latent_blocks, mixed, positives_of, quota, top_of
from mmsae.interpret.evidence.options import Evidencing
from mmsae.shards import FaultLog

D = 17


class FakePart:
    """A part in memory, its entries sorted latent after latent in two chunks."""

    def __init__(self, z, cut):
        starts, columns = [], {k: [] for k in ("item", "value", "position")}
        for lo, hi in ((0, cut), (cut, len(z))):
            j, i = z[lo:hi].T.nonzero()
            starts.append(np.searchsorted(j, np.arange(D + 1)))
            for name, v in (("item", (i + lo).astype(np.int32)), ("value", z[lo:hi][i, j]),
                            ("position", (i + j).astype(np.int32))):  # fmt: skip
                columns[name].append(v)
        self.arrays = {f"image.list.{k}": np.concatenate(v) for k, v in columns.items()}
        self.arrays["image.list.start"] = np.stack(starts)

    def get(self, name, dtype=np.int32):
        return self.arrays.get(name, np.zeros(0, dtype))


def corpus_of(monkeypatch, z, sizes, seed=0):
    rng, first = np.random.default_rng(seed), np.cumsum([0, *sizes])
    n = len(z)
    parts = [(FakePart(z[a:b], (b - a) // 2), int(a)) for a, b in pairwise(first)]
    monkeypatch.setattr(CorpusItems, "parts", lambda self: iter(parts))
    return CorpusItems([], first, rng.permutation(n).astype(np.int32), rng.random(n),
                       {"image": np.full(n, -1, np.int32)}, np.full(n, -1), {}, {"image": 1}, FaultLog())  # fmt: skip


def codes(n=200, seed=0, ties=True):
    rng = np.random.default_rng(seed)
    z = np.where(rng.random((n, D)) < 0.3, rng.standard_normal((n, D)), 0).astype(np.float32)
    if ties:
        z = np.round(z)  # many equal values
    z[:, 3] = 0
    return z


@pytest.mark.parametrize("budget", [1, 37, 500, 10**6])
def test_blocks_of_any_size_hold_all_entries_in_order(monkeypatch, budget):
    z = codes()
    corpus = corpus_of(monkeypatch, z, [90, 0, 60, 50])
    seen, most = np.zeros_like(z), 0
    for block in latent_blocks(corpus, "image", D, budget):
        seen[block.item, block.latent] = block.value
        key = block.latent.astype(int) * len(z) + block.item
        assert (np.diff(key) > 0).all() and (block.position >= 0).all()
        most = max(most, len(block.item)) if block.high - block.low > 1 else most
        assert block.start[-1] == len(block.item)
    assert (seen == z).all() and most <= budget


@pytest.mark.parametrize("budget", [60, 10**6])
def test_the_order_is_by_absolute_value_sign_and_uid(monkeypatch, budget):
    z = codes()
    corpus = corpus_of(monkeypatch, z, [100, 100])
    copies = np.where(np.arange(len(z)) % 9 == 0, 0, -1)
    for block in latent_blocks(corpus, "image", D, budget):
        ranked = RankedBlock.of(block, corpus, copies)
        top = top_of(block, ranked, 12)
        for j in range(block.low, block.high):
            on = [i for i in np.flatnonzero(z[:, j]) if copies[i] < 0]
            order = sorted(on, key=lambda i: (-abs(z[i, j]), -z[i, j], corpus.rank[i]))
            assert ranked.count[j - block.low] == len(on)
            assert block.item[ranked.at[ranked.latent == j - block.low]].tolist() == order
            got = top["item"][j - block.low]
            assert got.tolist() == (order[:12] + [-1] * 12)[:12]
            assert (top["value"][j - block.low][: len(order)] == z[order[:12], j]).all()


def test_draws_of_a_quantile_are_random_and_depend_on_the_seed(monkeypatch):
    z = np.abs(codes(2000, ties=False))
    corpus = corpus_of(monkeypatch, z, [2000])
    (block,) = latent_blocks(corpus, "image", D)
    ranked = RankedBlock.of(block, corpus, None)
    drawn = [positives_of(block, ranked, corpus, Evidencing(quantiles=5, each=4, seed=s)) for s in (0, 0, 1)]
    assert (drawn[0][0] == drawn[1][0]).all() and (drawn[0][0] != drawn[2][0]).mean() > 0.5
    assert drawn[0][1].sum() == D - 1
    # ranks within a quantile are spread over it
    place = np.zeros((D, 2000))
    place[ranked.latent, block.item[ranked.at]] = ranked.place / ranked.count[ranked.latent]
    inner = np.concatenate([place[j, drawn[0][0][j].ravel()] * 5 % 1 for j in range(D) if j != 3])
    assert 0.4 < inner.mean() < 0.6 and inner.std() > 0.2


def test_halves_get_equal_shares():
    assert quota(4) == (2, 2) and quota(5) == (3, 2) and quota(1) == (1, 0)
    x = mixed(np.linspace(0, 0.999, 5000), np.zeros(5000, int), 0)
    assert len(set(x.tolist())) == 5000 and abs((x >> np.uint64(63)).mean() - 0.5) < 0.05
