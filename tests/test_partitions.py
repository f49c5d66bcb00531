"""Sorting through files gives what sorting in memory gives, for any distribution, and leaves nothing behind."""

from functools import partial

import numpy as np
import pytest

from mmsae import partitions
from mmsae.partitions import (
    ascending,
    by_part,
    from_order_key,
    nth,
    order_key,
    order_statistics,
    repeated,
)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Files and recursion with few records."""
    monkeypatch.setattr(partitions, "ROWS", 64)
    monkeypatch.setattr(partitions, "FILES", 8)


def blocks(x, size=50):
    for lo in range(0, len(x), size):
        yield x[lo : lo + size]


def words(kind, n=1500):
    rng = np.random.default_rng(0)
    if kind == "uniform":
        return rng.integers(0, 2**64, (n, 2), np.uint64, endpoint=False)
    if kind == "counter":  # all leading bits equal
        return np.stack([np.zeros(n, np.uint64), rng.permutation(n).astype(np.uint64)], 1)
    if kind == "one value":
        return np.ones((n, 2), np.uint64)
    if kind == "mostly one value":
        x = rng.integers(0, 2**64, (n, 2), np.uint64, endpoint=False)
        x[: n - 20, 0] = 7
        return x
    x = rng.integers(0, 50, (n, 2), np.uint64)
    x[:5, 0] = 2**63
    return x


KINDS = ["uniform", "counter", "one value", "mostly one value", "few values"]


@pytest.mark.parametrize("kind", KINDS)
def test_records_come_in_order(kind, tmp_path):
    x = words(kind)
    found = np.concatenate(list(ascending(partial(blocks, x), 2, tmp_path)))
    assert np.array_equal(found, x[np.lexsort((x[:, 1], x[:, 0]))])
    assert not list(tmp_path.iterdir())
    assert not list(ascending(lambda: iter(()), 2, tmp_path))
    empty = x[:0]  # as parts without samples give it, the last ones too
    with_empty = ascending(lambda: iter([empty, *blocks(x), x[:40], empty, empty]), 2, tmp_path)
    assert sum(map(len, with_empty)) == len(x) + 40 and not list(tmp_path.iterdir())


def test_blocks_stay_small(tmp_path):
    assert max(map(len, ascending(partial(blocks, words("uniform")), 2, tmp_path))) <= partitions.ROWS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 749, 1499])
def test_the_nth_record(kind, n):
    x = words(kind)
    assert np.array_equal(nth(partial(blocks, x), 2, n), x[np.lexsort((x[:, 1], x[:, 0]))][n])


@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "i8"])
def test_keys_keep_the_order_and_order_statistics_are_exact(dtype):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(2000) * 10.0 ** rng.integers(-3, 4, 2000)).astype(dtype)
    x[:200] = x[200]
    assert np.array_equal(np.argsort(order_key(x), kind="stable"), np.argsort(x, kind="stable"))
    assert np.array_equal(from_order_key(order_key(x), x.dtype), x)
    ranks = np.array([0, 17, 17, 999, 1999])
    found = order_statistics(partial(blocks, x), ranks)
    assert found.dtype == x.dtype and np.array_equal(found, np.sort(x)[ranks])


@pytest.mark.parametrize("kind", ["uniform", "one value", "few values"])
def test_rows_whose_uid_came_before(kind, tmp_path):
    x = words(kind)
    if kind == "uniform":
        x[[5, 700, 1499]] = x[[4, 4, 0]]
    first, expected = {}, []
    for row, uid in enumerate(map(tuple, x.tolist())):
        if first.setdefault(uid, row) != row:
            expected.append([row, first[uid]])
    found = list(repeated(partial(blocks, x), tmp_path))
    assert np.concatenate(found).tolist() == expected and not list(tmp_path.iterdir())
    starts = np.array([0, 10, 10, 1000, 1500])
    parts = list(by_part(iter(found), starts))
    assert np.concatenate([p for _, p in parts]).tolist() == expected
    assert [i for i, _ in parts] == sorted({i for i, _ in parts})
    for i, p in parts:
        assert (p[:, 0] >= starts[i]).all() and (p[:, 0] < starts[i + 1]).all()


def test_uids_that_all_differ(tmp_path):
    assert not any(len(b) for b in repeated(partial(blocks, words("counter")), tmp_path))
