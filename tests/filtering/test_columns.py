"""Figures of columns on disk are those of numpy in memory, and the same from many blocks."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsae.filtering import columns
from mmsae.filtering.columns import Column, ScoredSamples, Summary, histogram, rank_correlations, read_samples
from mmsae.types import InputError


def in_memory(values):
    names = ("min", "p05", "p25", "median", "p75", "p95", "max")
    found = np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).tolist()
    return {"mean": float(values.mean()), "std": float(values.std())} | dict(zip(names, found, strict=True))


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
@pytest.mark.parametrize("dtype", ["f4", "i4", "f8"])
def test_summaries(n, dtype, tmp_path, monkeypatch):
    rng = np.random.default_rng(n)
    values, on = (rng.standard_normal(n) * 30).astype(dtype), rng.random(n) < 0.5
    on[0] = True
    column, among = Column.write(tmp_path / "a", dtype, iter([values])), Column.write(tmp_path / "b", bool, iter([on]))
    assert Summary(column).to_dict() == in_memory(values) and Summary(column, among).to_dict() == in_memory(values[on])
    monkeypatch.setattr(columns, "BLOCK", 64)
    many, once = Summary(column, among).to_dict(), in_memory(values[on])
    assert {k: many[k] for k in columns.QUANTILES} == {k: once[k] for k in columns.QUANTILES}
    assert many == pytest.approx(once, rel=1e-5, abs=1e-5)


def test_histogram_counts_every_sample(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    values, on = rng.standard_normal(500).astype("f4"), rng.random(500) < 0.3
    monkeypatch.setattr(columns, "BLOCK", 64)
    column, kept = Column.write(tmp_path / "a", "f4", iter([values])), Column.write(tmp_path / "b", bool, iter([on]))
    edges, counts = histogram(column, kept, (values.min(), values.max()))
    assert np.array_equal(edges, np.histogram_bin_edges(values, 50))
    assert np.array_equal(counts, [np.histogram(v, edges)[0] for v in (values[on], values[~on])])


def test_rank_correlations_of_many_are_of_a_sample(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    uids = np.stack([np.zeros(4000, np.uint64), np.arange(4000, dtype=np.uint64)], 1)  # numbers in order
    a = rng.standard_normal(4000)
    numbers = {"a": a, "b": -a, "c": a + rng.standard_normal(4000)}
    files = {c: Column.write(tmp_path / c, "f8", iter([v])) for c, v in numbers.items()}
    Column.write(tmp_path / "u", "u8", iter([uids.ravel()]))
    samples = ScoredSamples(Column(tmp_path / "u", "u8", 4000, 2), files, [4000])
    all_ = rank_correlations(samples)
    monkeypatch.setattr(columns, "BLOCK", 1000)
    drawn = columns._drawn(samples)
    assert 850 < len(drawn["a"]) < 1150 and np.array_equal(drawn["b"], -drawn["a"])
    some = rank_correlations(samples)
    assert some["a"]["b"] == all_["a"]["b"] == -1 and some["a"]["c"] == pytest.approx(all_["a"]["c"], abs=0.06)


def test_parts_become_columns(tmp_path):
    text = {"key": ["a", "b"], "shard": ["s", "s"], "caption": ["x", "y"]}
    lists = {"code_latents": [[1], []], "query.image.3": [0.5, 0.0]}
    pq.write_table(pa.table({"uid": ["0" * 31 + "1", "f" * 32], **text, "words": [1, 2], **lists}), tmp_path / "1.part")
    pq.write_table(pa.table({"uid": pa.array([], pa.string())}), tmp_path / "0.part")
    found = read_samples([tmp_path / "0.part", tmp_path / "1.part"], tmp_path / "columns")
    assert found.sizes == [0, 2] and found.starts == [0, 0, 2] and found.n == 2
    assert list(found.numbers) == ["words"] and found.numbers["words"].whole().tolist() == [1, 2]
    assert found.uid_text().tolist() == ["0" * 31 + "1", "f" * 32]
    with pytest.raises(InputError, match="not one usable sample in 1 shards"):
        read_samples([tmp_path / "0.part"], tmp_path / "columns")
