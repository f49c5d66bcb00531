"""``mmsae bench names`` at smoke size: what it writes, and that it goes on."""

import json

import pytest

from mmsae import SAE
from mmsae.bench.names.run import BARS, CALIBRATED, METHODS, NameSizes, bench_names


@pytest.mark.slow
def test_it_writes_its_table_and_goes_on(tmp_path):
    size = NameSizes(train=2000, items=1000, clip_steps=30, sae_steps=40)
    found = bench_names(tmp_path / "b", (0,), size, progress=False)
    assert set(found["methods"]) == {CALIBRATED, *METHODS} and set(found["bars"]) == {*BARS, "dealt"}
    held = found["methods"][CALIBRATED]
    assert 0.5 <= held["abstained_random"] <= 1 and held["random"] > 0 and 0.5 <= held["least"] < 1
    dealt = found["intruder"]["truth_random_dealt"]
    assert dealt["sets"] > 100 and dealt["mean"][1] - 0.1 < 0.2 < dealt["mean"][2] + 0.1
    for name in ("sae", "random", "null"):
        assert SAE.from_pretrained(tmp_path / "b" / "seed_0" / name).selector.name == "jumprelu"
    table = (tmp_path / "b" / "table.md").read_text()
    assert "abstention on latents of random weights" in table and "items dealt at random" in table
    kept = tmp_path / "b" / "runs" / "0.json"
    before = kept.stat().st_mtime_ns
    again = bench_names(tmp_path / "b", (0,), size, progress=False)
    assert kept.stat().st_mtime_ns == before and again["runs"] == found["runs"]
    assert json.loads((tmp_path / "b" / "results.json").read_text())["seeds"] == [0]
