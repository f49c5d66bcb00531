"""Filtering: the result is complete and explained, members are untouched, and kills or processes change no byte."""

import os
import random
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmsae.cli import main
from mmsae.filtering.command import filter_command
from mmsae.filtering.scorers.clip import ClipScorer
from mmsae.filtering.truth import damage_auroc
from mmsae.options import call
from mmsae.shards import FaultLog, read_shard
from tests.helpers.filtering import QUIET, filter_shards, make_host, make_shards, results, tree


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("filter")
    make_host(root)
    (root / "damaged.txt").write_text("\n".join(make_shards(root / "shards")))
    make_shards(root / "clean", 48, share=0)
    return root


def args(root, **more):
    return {"sae": str(root / "clip-sae"), "shards": str(root / "shards"), **QUIET, **more}


@pytest.fixture(scope="module")
def whole(root):
    """An uninterrupted run, with its report."""
    return Path(call(filter_command, **args(root, out=str(root / "whole"), keep=0.4)))


def test_everything_is_written(whole):
    names = set(tree(whole))
    assert names == {
        *("report.html", "results.json", "scores.parquet", "uids.npy", "pair_weights.json", "pair_weights.safetensors"),
        *(f"shards/kept-{i:06d}.tar" for i in range(3)),
    }
    table = pq.read_table(whole / "scores.parquet").to_pydict()
    assert sum(table["kept"]) == 32 and len(table["uid"]) == 80
    assert {"clip", "clip_centred", "pair_code", "pair_weighted", "l0_image", "words", "caption", "key"} <= set(table)
    score = np.array(table["pair_weighted"])
    kept = np.array(table["kept"])
    assert score[kept].min() >= score[~kept].max()
    assert sorted(o for o in table["order"] if o >= 0) == list(range(32))
    uids = np.load(whole / "uids.npy")
    assert uids.dtype == np.dtype("u8,u8")
    assert [f"{a:016x}{b:016x}" for a, b in uids.tolist()] == sorted(
        u for u, k in zip(table["uid"], table["kept"], strict=True) if k
    )
    r = results(whole)
    assert r["kept"] == 32 and r["dropped"] == 48 and r["written_shards"] == 3
    assert r["spearman"]["pair_code"]["pair_code"] == 1 and "words" in r["spearman"]["pair_weighted"]
    assert r["weights"]["pairs"] == 80 and set(r["weights"]) >= {"sae", "host", "sites", "data"}


def test_it_says_why(whole):
    table = pq.read_table(whole / "scores.parquet").to_pylist()
    assert any(row["text_only"] for row in table) and any(row["image_only"] for row in table)
    for row in table:
        for side in ("text_only", "image_only"):
            strengths = row[f"{side}_strengths"]
            assert len(row[side]) == len(row[f"{side}_latents"]) == len(strengths)
            assert strengths == sorted(strengths, reverse=True) and all(s > 0 for s in strengths)
            assert all(w.startswith(f"#{j}") for w, j in zip(row[side], row[f"{side}_latents"], strict=True))
    page = (whole / "report.html").read_text()
    named = next(row for row in table if not row["kept"] and row["text_only"])
    assert "Dropped: the lowest scores" in page and "data:image/png" in page and "<svg" in page
    assert named["text_only"][0].split(" ", 1)[0] in page and "Spearman" in page


def members(paths):
    out = {}
    for path in paths:
        with tarfile.open(path) as tar:
            out |= {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    return out


def test_kept_members_are_byte_identical_and_in_order(root, whole):
    before, after = (members(sorted(Path(p).glob("*.tar"))) for p in (root / "shards", whole / "shards"))
    kept = [r["key"] for r in pq.read_table(whole / "scores.parquet").to_pylist() if r["kept"]]
    assert list(dict.fromkeys(n.split(".")[0] for n in after)) == kept
    assert {n: d for n, d in before.items() if n.split(".")[0] in kept} == after
    samples = [s for p in sorted((whole / "shards").glob("*.tar")) for s in read_shard(p, FaultLog())]
    assert [s.key for s in samples] == kept


def test_run_again_it_does_nothing(root, whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    call(filter_command, **args(root, out=str(whole), keep=0.4, progress=True))
    assert "finished before" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def forked(work, after=None):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def plain(root):
    """An uninterrupted run that chooses a set, without the report."""
    options = args(root, keep=0.2, select="match", target=str(root / "clean"), balance=0.8)
    return options, tree(filter_shards(**options, out=str(root / "plain")))


def test_kills_at_random_moments_change_nothing(root, plain, tmp_path, monkeypatch):
    options, expected = plain
    real, rng, out, kills = ClipScorer.score, random.Random(0), tmp_path / "o", 0
    monkeypatch.setattr(ClipScorer, "score", lambda self, batch: (time.sleep(0.06), real(self, batch))[1])
    while kills < 5 and not out.exists():
        kills += forked(lambda: filter_shards(**options, out=str(out)), rng.uniform(0.05, 0.4)) == -signal.SIGKILL
    assert kills >= 2
    monkeypatch.undo()
    assert tree(filter_shards(**options, out=str(out))) == expected
    assert not out.with_name("o.partial").exists()


def test_a_kill_at_any_step_of_writing_changes_nothing(root, plain, tmp_path):
    options, expected = plain
    steps, real = [0], os.replace

    def counting(kill, after):
        def replace(a, b):
            steps[0] += 1
            if after:
                real(a, b)
            if steps[0] == kill:
                Path(a).with_name(Path(a).name + "x").write_bytes(b"half") if not after else None
                os.kill(os.getpid(), signal.SIGKILL)
            if not after:
                real(a, b)

        return replace

    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "replace", counting(-1, True))
        filter_shards(**options, out=str(tmp_path / "count"))
    total = steps[0]
    assert total > 20
    for kill in [*range(2, total - 8, 4), *range(total - 7, total + 1)]:
        out = tmp_path / f"o{kill}"

        def work(kill=kill, out=out):
            steps[0] = 0
            os.replace = counting(kill, after=kill % 2 == 0)
            filter_shards(**options, out=str(out))

        assert forked(work) == -signal.SIGKILL, kill
        assert not out.exists() or tree(out) == expected
        assert tree(filter_shards(**options, out=str(out))) == expected, kill
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(out.name)) == [out.name]


@pytest.mark.slow
def test_two_processes_give_the_same_files_as_one(root, whole):
    out = call(filter_command, **args(root, out=str(root / "two"), keep=0.4, devices=2))
    assert tree(out) == tree(whole)


def test_workers_do_not_matter(root, whole):
    assert tree(call(filter_command, **args(root, out=str(root / "workers"), keep=0.4) | {"workers": 2})) == tree(whole)


def test_the_choice_of_a_set_is_reported(root, plain):
    s = results(root / "plain")["selection"]
    assert set(s["kl"]) == {"selected", "greedy", "random", "modular", "everything"} == set(s["objective"])
    assert s["kl"]["selected"] < s["kl"]["random"] and s["objective"]["greedy"] >= s["objective"]["modular"]
    assert s["rounds"] > 0 and s["swaps"] >= 0
    assert s["target_items"]["matched"] + s["target_items"]["held_out"] == 48
    assert s["last_gain"] <= s["first_gain"] and s["candidates"] == 65  # four fifths of each tar of 16, rounded up
    assert np.load(root / "plain" / "target.npy").sum() == pytest.approx(1)


def test_cover_takes_more_concepts_than_random(root):
    filter_shards(**args(root, out=str(root / "cover"), keep=0.1, select="cover"))
    s = results(root / "cover")["selection"]
    assert s["objective"]["selected"] >= max(s["objective"]["random"], s["objective"]["modular"])
    assert "kl" not in s


def test_weights_are_used_again_and_calibration_adds_a_score(root):
    clean = filter_shards(**args(root, out=str(root / "cal"), score="pair_calibrated", calibration=str(root / "clean")))
    table = pq.read_table(Path(clean) / "scores.parquet")
    assert "pair_calibrated" in table.column_names and results(clean)["weights"]["clean"] is True
    weights = str(Path(clean) / "pair_weights.safetensors")
    again = filter_shards(**args(root, out=str(root / "again"), score="pair_calibrated", weights=weights))
    assert tree(again)["scores.parquet"] == tree(clean)["scores.parquet"]


def test_scores_find_damage_no_worse_than_they_do(root, whole):
    """The host is random, so the figures say nothing; each must be that of the column it is named after."""
    damaged = set((root / "damaged.txt").read_text().split())
    found = damage_auroc(whole / "scores.parquet", damaged)
    assert set(found) == {"clip", "clip_centred", "pair_code", "pair_weighted"}
    table = pq.read_table(whole / "scores.parquet").to_pydict()
    bad = np.array([u in damaged for u in table["uid"]])
    x = np.array(table["clip"])
    assert found["clip"] == pytest.approx((x[~bad][:, None] > x[bad][None]).mean())


def test_random_and_recipe(root, tmp_path):
    base = ["--sae", str(root / "clip-sae"), "--shards", str(root / "shards"), "--workers", "0", "--progress", "false"]
    main(["filter", *base, "--out", str(tmp_path / "a"), "--score", "random", "--keep", "0.25", "--seed", "3"])
    assert results(tmp_path / "a")["kept"] == 20 and "random" in results(tmp_path / "a")["scores"]
    recipe = str(Path(__file__).parents[2] / "configs/filter/pair_weighted.yaml")
    main(["filter", "-c", recipe, *base, "--out", str(tmp_path / "b")])
    assert results(tmp_path / "b")["job"]["score"] == "pair_weighted"
