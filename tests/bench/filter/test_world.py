"""The benchmark of filtering: what the alignment set is, what the scores find in it, and the whole at smoke size."""

import json

import numpy as np
import pytest

from mmsae import InputError
from mmsae.bench.command import FilterBench, bench
from mmsae.bench.filter.arms import BLIND, LIKELIHOOD, PAIR, SAE_V
from mmsae.bench.filter.report import verdict
from mmsae.bench.filter.run import FilterSizes, bench_filter
from mmsae.bench.filter.world import KINDS, alignment_set, mixed_questions, top_half
from mmsae.world.generator.data import generate
from mmsae.world.models.llava.questions import DESCRIBE, OBJECTS, ask, present_objects, shard_lessons

TINY = FilterSizes(
    scenes=120, clip_steps=2, base_steps=2, samples=80, sae_steps=3, d_sae=32, k=4, steps=2, batch_size=8, exam=8
)
ARMS = ("all", "random", "cos_mean", "oracle")


@pytest.fixture(scope="module")
def data():
    return alignment_set(200, 5, 0.4)


def test_damage_is_what_it_says(data):
    world = generate(200, 5)
    present, asked = present_objects(world.scenes), {ask(o): i for i, o in enumerate(OBJECTS)}
    counts = {k: int((data.kind == k).sum()) for k in KINDS}
    assert counts == {"swapped": 20, "attribute": 20, "answer": 40} and data.is_caption.sum() == 100
    for i in range(200):
        if data.is_caption[i]:
            a, b = data.answers[i], world.full[i]
            assert data.questions[i] == DESCRIBE and (a == b) == (data.kind[i] == "") and data.kind[i] != "answer"
            if data.kind[i] == "attribute":
                assert sum(x != y for x, y in zip(a.split(), b.split(), strict=True)) == 1
        else:
            truth = present[i, asked[data.questions[i]]]
            assert (data.answers[i] == "yes") == (truth != (data.kind[i] == "answer"))
    again = alignment_set(200, 5, 0.4)
    assert again.answers == data.answers and np.array_equal(again.kind, data.kind)
    assert 0.35 < mixed_questions(world, 5).answers.mean() < 0.65


def test_shards_teach_the_same(data, tmp_path):
    data.write(tmp_path)
    rows = np.arange(200)
    got, want = shard_lessons(str(tmp_path)), data.lessons(rows)
    assert np.array_equal(got.images, want.images)
    asked = np.flatnonzero(~data.is_caption)
    assert [got.dialogues[i] for i in asked] == [want.dialogues[i] for i in asked]
    assert all(
        want.captions[i] == [data.answers[i]] and want.dialogues[i] is None for i in np.flatnonzero(data.is_caption)
    )


def test_half_of_each_task_is_kept_and_ties_go_by_seed(data):
    rows = top_half(data.clean.astype(float), data.is_caption, 0)
    assert len(rows) == 100 and data.clean[rows].all() and data.is_caption[rows].sum() == 50
    level = np.where(data.is_caption, 1e3, 0) + np.arange(200)  # captions score higher, whatever they say
    assert data.is_caption[top_half(level, data.is_caption, 0)].sum() == 50
    flat = [top_half(np.zeros(200), data.is_caption, s) for s in (0, 0, 1)]
    assert np.array_equal(flat[0], flat[1]) and not np.array_equal(flat[0], flat[2])
    assert len(top_half(np.arange(5.0), np.array([1, 1, 1, 0, 0], bool), 0)) == 3  # 2 of 3 and 1 of 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    return root, bench_filter(root, TINY, ARMS, (0,), progress=False)


def test_results(finished):
    root, results = finished
    assert results["out"] == str(root / "report.html") and json.loads((root / "results.json").read_text())["arms"]
    assert set(results["arms"]) == set(results["summary"]) == set(ARMS)
    found = results["detection"]
    assert {*SAE_V, *PAIR, BLIND, LIKELIHOOD, "random", "oracle"} <= set(found)
    assert all(found["oracle"][k] == 1 for k in KINDS)
    assert all(0 <= row[k] <= 1 for row in found.values() for k in KINDS)
    assert [results["arms"][a][0]["kept"] for a in ARMS] == [80, 40, 40, 40]
    assert results["arms"]["oracle"][0]["damaged"] == 0 and results["arms"]["all"][0]["damaged"] == 0.4
    assert results["summary"]["all"]["ratio"] == 1 and results["summary"]["all"]["accuracy_sd"] is None
    for score in SAE_V:  # prompt and image do not tell which answer is wrong: captions all have the same prompt
        assert np.isfinite(found[f"{score}/question"]["swapped"])
    table = (root / "table.md").read_text()
    assert all(f"| {a} |" in table for a in ARMS) and verdict(results) in table
    assert (root / "accuracy.png").read_bytes()[:4] == b"\x89PNG" and "110%" in (root / "report.html").read_text()


def test_goes_on_with_what_is_missing_and_repeats_it_to_the_bit(finished, monkeypatch, capsys):
    root, results = finished
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*.json") if f.parent.name in ("stages", "arms")}
    gone = root / "arms" / "oracle-0.json"
    old = json.loads(gone.read_text())["value"]
    gone.unlink()
    again = bench_filter(root, TINY, ARMS, (0,), progress=True)
    assert json.loads(gone.read_text())["value"] == old and again["arms"] == results["arms"]
    assert all(f.stat().st_mtime_ns == t for f, t in before.items() if f != gone)
    said = capsys.readouterr().out
    assert "[arms/oracle-0]" in said and "[arms/all-0]" not in said
    more = bench_filter(root, TINY, ("all",), (0, 1), progress=False)
    assert len(more["arms"]["all"]) == 2 and more["summary"]["all"]["accuracy_sd"] is not None


def test_bad_input(finished, tmp_path):
    root, _ = finished
    with pytest.raises(InputError, match=r"its damage is 0\.4 there and 0\.3 here; choose another --out"):
        bench_filter(root, TINY, ARMS, (0,), damage=0.3, progress=False)
    with pytest.raises(InputError, match="there is no best; there are all, random"):
        bench(
            "filter",
            out=str(tmp_path / "x"),
            alignment=FilterBench(
                arms=(
                    "all",
                    "best",
                )
            ),
        )
    with pytest.raises(InputError, match="all must be among l1: the others"):
        bench("filter", out=str(tmp_path / "x"), alignment=FilterBench(arms=("l1",)))
    with pytest.raises(InputError, match=r"damage is 0\.6"):
        bench("filter", out=str(tmp_path / "x"), alignment=FilterBench(damage=0.6))
    with pytest.raises(InputError, match="at least 1"):
        bench("filter", out=str(tmp_path / "x"), seeds=[])
    assert not (tmp_path / "x").exists()
