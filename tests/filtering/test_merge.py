"""What is kept of samples on disk is what sorting all of them in memory keeps, and memory does not grow with them."""

import numpy as np
import pytest

from benchmarks.merge import merged, write_parts
from mmsae import partitions
from mmsae.filtering import columns
from mmsae.filtering.choose import check_memory
from mmsae.filtering.columns import Column, ScoredSamples
from mmsae.filtering.merge import budget, keep_best, keep_rows, write_uids
from mmsae.shards.uids import DATACOMP, hex_uids
from mmsae.types import InputError
from tests.helpers.stores import peak


def samples_of(folder, scores, seed=0):
    n = len(scores)
    uids = np.random.default_rng(seed).integers(0, 2**64, (n, 2), np.uint64, endpoint=False)
    Column.write(folder / "uids", np.uint64, iter([uids.ravel()]))
    score = Column.write(folder / "score", scores.dtype, iter([scores]))
    return ScoredSamples(Column(folder / "uids", np.uint64, n, 2), {"score": score}, [n])


@pytest.mark.parametrize("kind", ["all differ", "few values", "one value", "zeros of both signs"])
@pytest.mark.parametrize("b", [1, 333, 2000])
@pytest.mark.parametrize("some", [False, True])
def test_the_best_are_kept_in_order_and_ties_go_to_the_lower_uid(kind, b, some, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "BLOCK", 300)
    monkeypatch.setattr(partitions, "ROWS", 64)
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(2000).astype("f4")
    if kind != "all differ":
        levels = {"few values": 5, "one value": 1, "zeros of both signs": 1}[kind]
        scores = rng.integers(0, levels, 2000).astype("f4")
        scores[::2] *= -1.0 if kind == "zeros of both signs" else 1.0
    samples = samples_of(tmp_path, scores)
    among = rng.random(2000) < 0.6 if some else None
    order = np.lexsort((samples.uid_text(), -scores))
    rows = (order if among is None else order[among[order]])[:b]
    kept = keep_best(samples, "score", len(rows), tmp_path, among)
    assert np.array_equal(np.flatnonzero(kept.on.whole()), np.sort(rows))
    places = np.full(2000, -1, np.int32)
    places[rows] = np.arange(len(rows))
    assert np.array_equal(kept.order.whole(), places) and kept.order.dtype == np.int32
    again = keep_rows(samples, rows, tmp_path)
    assert np.array_equal(again.on.whole(), places >= 0) and np.array_equal(again.order.whole(), places)


def test_the_list_of_uids_is_datacomps(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "BLOCK", 100)
    monkeypatch.setattr(partitions, "ROWS", 64)
    samples = samples_of(tmp_path, np.arange(500, dtype="f4"))
    kept = keep_best(samples, "score", 201, tmp_path)
    write_uids(tmp_path / "uids.npy", samples, kept, tmp_path)
    pairs = np.array(
        [(int(u[:16], 16), int(u[16:], 16)) for u in hex_uids(samples.uids.whole()[-201:])], dtype=DATACOMP
    )
    pairs.sort()
    np.save(tmp_path / "expected.npy", pairs)
    assert (tmp_path / "uids.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_a_share():
    assert [budget(10, 0.3), budget(10, 0.31), budget(3, 1.0)] == [3, 4, 3]


def test_what_does_not_fit_in_memory_is_refused():
    check_memory("a query", 10**6)
    with pytest.raises(InputError, match=r"--select cover holds all samples in memory, about 1000\.0 TB, and .* are"):
        check_memory("--select cover", 10**15)


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    grown = []
    for rows in (12_000, 120_000):
        for i in range(2):
            write_parts(tmp_path / f"{rows}-{i}", rows if i else 5000, 4000)
        grown.append(peak(lambda i, rows=rows: merged(tmp_path / f"{rows}-{i}", 4096)))
    held = grown[1] - grown[0]
    assert held < 6 * 2**20, f"{held} bytes more for 108,000 samples more"  # their uids as text are 9 MB
