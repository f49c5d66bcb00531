"""The benchmarks of speed: whether they run, whom they find to disagree, and what they make of their figures."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import contest, goals, measure, peers, train_step
from benchmarks.contest import STEP, field
from benchmarks.measure import Options, Result, Timing, interleave, peak_memory
from benchmarks.methods import Naive, Ours, Problem

ROOT = Path(__file__).parents[1]
SMALL = Problem("topk", 16, 48, 4, 16)


@pytest.fixture
def quick(tmp_path):
    return Options(device="cpu", quick=True, rounds=1, out=tmp_path)


def test_the_browser_is_measured(tmp_path, capsys):
    from benchmarks import browser

    browser.main(
        ["--latents", "300", "200", "--samples", "400", "400", "--patches", "0", "4", "--folder", str(tmp_path)]
    )
    *_, plain, patches = capsys.readouterr().out.strip().splitlines()
    plain, patches = ([c.strip() for c in line.strip("|").split("|")] for line in (plain, patches))
    assert (plain[0], plain[2], plain[6]) == ("300", "–", "–") and (patches[0], patches[2], patches[6]) == (
        "200",
        "4 x 4",
        "16",
    )
    assert all(0 < float(row[k]) < 60 for row in (plain, patches) for k in (7, 8)) and int(patches[3]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_step", "inference", "pursuit", "storage", "fit"])
def test_everything_runs_and_agrees(name, tmp_path):
    code = import_module(f"benchmarks.{name}").main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    assert code == 0, (tmp_path / f"{name}.md").read_text()
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    cases = {case: facts["timings"] for case, facts in found["cases"].items() if "timings" in facts}
    assert cases and all(len(t["ms"]) == 1 for facts in cases.values() for t in facts.values() if t["median"])
    if name == "train_step":
        assert [case.split()[0] for case in cases] == list(train_step.METHODS)
        for facts in cases.values():  # gradients of float32 against the dense formula in float64
            assert all(facts[n]["extra"]["gradients"] < 1e-5 for n in ("mmsae", "mmsae reference", "dense"))
            assert facts["mmsae"]["memory"] > 0
    assert (tmp_path / f"{name}.md").exists() and (tmp_path / f"{name}.png").exists()


class Wrong(Naive):
    name = "wrong"

    def loss(self, x):
        return 1.01 * super().loss(x)


def test_who_disagrees_is_named_and_ours_fails_the_benchmark(quick, monkeypatch):
    everybody = [("mmsae", partial(Ours, SMALL, "cpu")), ("wrong", partial(Wrong, SMALL, "cpu"))]
    monkeypatch.setattr(contest, "makers", lambda problem, options: iter(everybody))
    result = Result("x", quick)
    assert train_step.run(SMALL, quick, result, 1.0)
    timings = result.cases[str(SMALL)]["timings"]
    assert timings["wrong"]["note"] == "disagrees with the formula"
    assert timings["mmsae"]["extra"]["agrees"]
    everybody[0] = ("mmsae", partial(Wrong, SMALL, "cpu"))
    assert not train_step.run(SMALL, quick, result, 1.0)


@pytest.mark.parametrize("method", train_step.METHODS)
def test_a_gradient_that_is_missing_is_seen(quick, monkeypatch, method):
    """Of every weight: a contender whose encoder or decoder is not trained does not agree."""
    problem = Problem(method, *train_step.SMALL.get(method, (16, 48, 4, 16)))

    for weight in Naive(problem, "cpu").weights():

        class Frozen(Naive):
            def weights(self, weight=weight):
                w = dict(super().weights())
                w[weight] = (torch.nn.Parameter(w[weight][0].detach().clone()), False)
                return w

        monkeypatch.setattr(contest, "makers", lambda p, o, kind=Frozen: iter([("frozen", partial(kind, p, "cpu"))]))
        _, said = field(problem, quick, STEP)
        assert said["frozen"].extra["gradients"] == pytest.approx(1.0), weight


def test_absent_libraries_are_skipped_by_name(quick, monkeypatch):
    def absent(module):
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(peers, "import_module", absent)
    contenders, said = field(SMALL, quick, STEP)
    assert {"mmsae", "dense"} <= set(contenders)
    for peer in peers.peers(SMALL):
        assert peer.name not in contenders and "No module named" in said[peer.name].note


@pytest.mark.parametrize("peer", peers.ALL, ids=lambda p: p.name)
def test_installed_libraries_agree(peer, quick, monkeypatch):
    for method in peer.methods:
        problem = Problem(method, *train_step.SMALL.get(method, (16, 48, 4, 16)))
        monkeypatch.setattr(contest, "makers", lambda p, o: iter([(peer.name, partial(peer, p, "cpu"))]))
        contenders, said = field(problem, quick, STEP)
        if not contenders:
            pytest.skip(said[peer.name].note)
        # sparsify's AuxK does not train the encoder: the backward pass of its encoder takes no gradient of pre-codes
        assert said[peer.name].extra["agrees"] == ((peer.name, method) != ("sparsify", "topk_auxk")), method
        before = [w.detach().clone() for w, _ in contenders[peer.name].weights().values()]
        contenders[peer.name](problem.rows("cpu"))
        after = [w.detach() for w, _ in contenders[peer.name].weights().values()]
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rounds_are_interleaved_and_who_fails_is_left_out(tmp_path):
    order = []

    def fails():
        order.append("c")
        if order.count("c") > 2:
            raise ValueError("no more\nof this")

    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": fails}
    found = interleave(runs, Options(device="cpu", rounds=3, out=tmp_path), warm=1)
    assert order == ["a", "b", "c", "a", "b", "c", "b", "c", "a", "a", "b"]
    assert found["c"].note == "failed: ValueError: no more" and found["c"].ms == []
    assert [len(found[n].ms) for n in "ab"] == [3, 3]


def test_ratios_are_paired():
    slow, fast = Timing([2.0, 40.0, 6.0]), Timing([1.0, 10.0, 2.0])
    assert measure.paired(slow, fast) == (2.5, 3.0, 3.5)
    assert measure.paired(Timing(note="failed"), fast) is None


def test_peak_memory_is_that_of_the_worst_moment(tmp_path):
    def run():
        a = torch.zeros(2**20)  # 4 MiB
        del a
        b, c = torch.zeros(2**20), torch.zeros(2**19)
        return b[0] + c[0]

    assert peak_memory(run, Options(device="cpu", out=tmp_path)) == pytest.approx(6 * 2**20, rel=0.01)


def test_a_budget_is_shared_and_what_is_left_is_named(capsys, monkeypatch):
    now = iter([0.0, 0.0, 10.0, 31.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    given = [(case, o.seconds) for case, o in measure.shared(["a", "b", "c"], Options(budget=30.0))]
    assert given == [("a", 5.0), ("b", 5.0)]
    assert "no time left for: c" in capsys.readouterr().out


def timing(*ms, agrees=True):
    return {"ms": list(ms), "median": sorted(ms)[len(ms) // 2], "extra": {"agrees": agrees}}


def test_goals(tmp_path):
    steps = {
        f"topk {goals.A}": {
            "timings": {
                "mmsae": timing(10.0, 20.0, 10.0),
                "mmsae bf16": timing(1.0, 1.0, 1.0),  # is another model on a CPU
                "sparsify": timing(26.0, 52.0, 26.0),
                "overcomplete": timing(70.0, 140.0, 70.0),
                "sae-lens": timing(90.0, 180.0, 90.0),
                "product fp32": timing(5.0, 10.0, 5.0),
            }
        },
        f"topk_auxk {goals.A}": {"timings": {"mmsae": timing(10.0), "sparsify": timing(19.0, agrees=False)}},
    }
    write = {"environment": {"device": "a CPU"}, "cases": steps}
    (tmp_path / "train_step.json").write_text(json.dumps(write))
    rates = {"mmsae, shuffled": 100.0, "tar of one npy a row, webdataset": 1.0, "step of PairedTopK": 10.0}
    (tmp_path / "storage.json").write_text(json.dumps(write | {"cases": {"x": {"pairs_per_second": rates}}}))
    assert goals.main([str(tmp_path)]) == 0
    text = (tmp_path / "goals.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "2.60 (mmsae; sparsify)" in rows[f"TopK step, {goals.A}, over sparsify"]
    assert rows[f"TopK step, {goals.A}, over sparsify"].endswith("| reached |")
    assert rows[f"TopK step, {goals.A}, over the rest"].endswith(
        "| 7.00 (mmsae; overcomplete) | at least 6 | at least 8 | reached |"
    )
    assert (
        "2.00 (mmsae; product fp32) | at most 2.2 | at most 1.6 | reached"
        in rows[f"TopK step, {goals.A}, times its product"]
    )
    assert "1.90 (mmsae; sparsify, which disagrees with the formula)" in rows["AuxK, 10 % dead, over sparsify"]
    assert rows["AuxK, 10 % dead, over sparsify"].endswith("| missed |")
    assert rows["MP codes, over overcomplete"].endswith("| not run |")
    assert rows["shuffled loader, over a tar of npy"].endswith("| 100.0 | at least 50 | – | reached |")
    assert rows["shuffled loader, over the step's need"].endswith("| missed |")


def test_goals_of_a_gpu(tmp_path):
    case = {
        "mmsae": timing(5.0, 5.0),
        "mmsae bf16": timing(4.0, 4.0),
        "dense, bf16 autocast": timing(14.0, 14.0),
        "sparsify": timing(3.0, 3.0),
        "floor: product bf16 and bytes": timing(3.0),
    }
    write = {
        "environment": {"device": "NVIDIA H200", "cuda": "13.0"},
        "cases": {f"topk {goals.LARGE}": {"timings": case}},
    }
    (tmp_path / "train_step.json").write_text(json.dumps(write))
    loops = {"bare step": timing(1.0), "mmsae fit": timing(2.0), "mmsae fit, resident": timing(1.1)}
    write["cases"] = {"768/6144/32/4096, store of 343,000 rows": {"timings": loops}}
    (tmp_path / "fit.json").write_text(json.dumps(write))
    text = goals.table(tmp_path)
    assert f"TopK step, {goals.LARGE}, over dense bf16 | 3.50 (mmsae bf16; dense, bf16 autocast) |" in text
    assert "0.75 (mmsae bf16; floor: product bf16 and bytes) | at least 0.55 | at least 0.7 | stretch reached" in text
    assert "over sparsify | 0.75 (mmsae bf16; sparsify) | at least 3.5 | – | missed" in text
    assert f"topk {goals.LARGE} step, ms | 4.00 (mmsae bf16) | at most 4.8 | at most 3.6 | reached |" in text
    assert f"paired_topk {goals.USUAL} step, ms | – | at most 2.5 | at most 1.6 | not run |" in text
    assert "times the bare step, ratio | 1.10 (mmsae fit, resident) | at most 1.18 | at most 1.05 | reached |" in text


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_dry(tmp_path):
    env = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("train_step", "inference", "fit"):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["environment"]["date"] and found["options"]["budget"] > 0
    assert "mmsae triton" in (tmp_path / "train_step.md").read_text()
    assert "not run" in (tmp_path / "goals.md").read_text()
    assert "skipped" in (tmp_path / "tests.txt").read_text()


PARTS = ("pytest", "train_step", "fit", "inference", "host_work", "goals")
STUB = """#!/usr/bin/env bash
for part in pytest train_step fit inference host_work goals; do
    [[ " $* " =~ [\\ .]$part[\\ ] ]] && echo "$part" >> "$CALLED" && [ "$part" = "$BAD" ] && eval "$HOW"
done
exit 0
"""


def as_on_a_gpu(tmp_path, budget, bad="", how="exit 1"):
    """The script with a Python that notes what is run, of which ``bad`` does what ``how`` says, and what was run."""
    stub, called = tmp_path / "python", tmp_path / "called"
    stub.write_text(STUB)
    stub.chmod(0o755)
    called.write_text("")
    env = os.environ | dict(PYTHON=str(stub), CALLED=str(called), BAD=bad, HOW=how, BUDGET=str(budget))
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
    return subprocess.run(command, capture_output=True, text=True, env=env), called.read_text().split()


@pytest.mark.parametrize("bad", ["", *PARTS])
def test_the_script_for_a_gpu_goes_on_where_a_part_fails(tmp_path, bad):
    done, called = as_on_a_gpu(tmp_path, 340, bad)
    assert called == list(PARTS)
    name = {"pytest": "tests"}.get(bad, bad)
    assert done.returncode == bool(bad)
    assert not bad or done.stderr.strip() == f"failed, or an mmsae contender disagrees: {name}"


def test_no_part_runs_without_a_bound_when_the_time_is_over(tmp_path):
    done, called = as_on_a_gpu(tmp_path, 4)
    assert called == ["goals"] and done.returncode == 1
    assert all(f"{name} (no time)" in done.stderr for name in ("tests", "train_step", "fit", "inference", "host_work"))


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_with_the_time(tmp_path):
    start = time.monotonic()
    done, called = as_on_a_gpu(tmp_path, 24, "train_step", "exec sleep 600")
    assert 20 < time.monotonic() - start < 60
    assert called == ["pytest", "train_step", "goals"] and "train_step fit (no time)" in done.stderr


def test_the_arithmetic_of_large_trainings_is_that_of_tensors_and_of_the_page():
    from benchmarks import arithmetic
    from mmsae.sae import SAE, Dictionary

    page = (ROOT / "docs" / "how-to" / "scale.md").read_text()
    assert all(table in page for table in arithmetic.tables())
    for keys in (("shared",), ("image", "text")):
        sae = SAE(24, 160, dictionaries={key: Dictionary(bias=False) for key in keys})
        optimizer = torch.optim.Adam(sae.parameters())
        x = torch.randn(50, 24)
        sum(out.x_hat.square().sum() for out in sae({"image": x, "text": x}).values()).backward()
        optimizer.step()
        held = [*sae.parameters(), *(p.grad for p in sae.parameters())]
        held += [t for moments in optimizer.state.values() for t in moments.values()]
        assert sum(t.nbytes for t in held if t.dim() == 2) == arithmetic.kept(160, 24, len(keys))
