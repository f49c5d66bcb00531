"""``mmsae bench names`` at smoke size: what it writes, and that it goes on."""

import json

import pytest

from mmsae.bench.names.run import BARS, METHODS, NameSizes, bench_names


@pytest.mark.slow
def test_it_writes_its_table_and_goes_on(tmp_path):
    size = NameSizes(train=2000, items=1000, clip_steps=30, sae_steps=40)
    found = bench_names(tmp_path / "b", (0,), size, progress=False)
    assert set(found["methods"]) == set(METHODS) and set(found["bars"]) == set(BARS)
    assert 0 <= found["methods"]["all"]["abstained_random"] <= 1 and found["methods"]["all"]["random"] > 0
    table = (tmp_path / "b" / "table.md").read_text()
    assert "abstention on latents of random weights" in table and "the host's embeddings" in table
    kept = tmp_path / "b" / "runs" / "0.json"
    before = kept.stat().st_mtime_ns
    again = bench_names(tmp_path / "b", (0,), size, progress=False)
    assert kept.stat().st_mtime_ns == before and again["runs"] == found["runs"]
    assert json.loads((tmp_path / "b" / "results.json").read_text())["seeds"] == [0]
