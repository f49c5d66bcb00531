"""``mmsae bench recover`` at smoke size: what it writes, that it goes on, and what it refuses."""

import json

import pytest

from mmsae import InputError
from mmsae.bench.command import SAEBench, bench
from mmsae.bench.recover.claims import CLAIMS, answers
from mmsae.bench.recover.fast import NAME
from mmsae.bench.recover.run import bench_recover
from mmsae.bench.recover.worlds import WORLDS
from mmsae.recipes import recipes_of

NAMES = ["topk", "topk (untrained)", "relu_l1", "paired_topk"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("recover")
    return root, bench_recover(root, NAMES, ["hierarchical", "two_modalities"], (0, 1), steps=60, progress=False)


def test_what_it_writes(done):
    root, found = done
    assert set(found["worlds"]["hierarchical"]) == {"topk", "topk (untrained)", "relu_l1"}  # pairs need two modalities
    assert set(found["worlds"]["two_modalities"]) == set(NAMES)
    trained, not_trained = (found["worlds"]["hierarchical"][n] for n in ("topk", "topk (untrained)"))
    assert trained["fvu"] < not_trained["fvu"] and trained["cosine"] > not_trained["cosine"]
    assert trained["strength"] == 1 and "fvu_sd" in trained
    assert (root / "strengths" / "hierarchical-relu_l1.json").exists()
    table = (root / "table.md").read_text()
    assert "### hierarchical: 3 parents" in table and "not asked" in table
    assert all((root / name).stat().st_size for name in ("recovery.png", "report.html"))
    assert json.loads((root / "results.json").read_text())["worlds"] == found["worlds"]


def test_it_goes_on_without_training_again(done, monkeypatch):
    root, found = done

    def never(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr("mmsae.bench.recover.run.figures", never)
    again = bench_recover(root, NAMES, ["hierarchical", "two_modalities"], (0, 1), steps=60, progress=False)
    assert again["worlds"] == found["worlds"]
    with pytest.raises(InputError, match="steps is 60 there and 61 here"):
        bench_recover(root, NAMES, (), (0,), steps=61, progress=False)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="variants: there is no top_k; there are"):
        bench("recover", out=str(tmp_path / "x"), saes=SAEBench(variants=("top_k",)))
    with pytest.raises(InputError, match="worlds: there is no flat"):
        bench("recover", out=str(tmp_path / "x"), saes=SAEBench(worlds=("flat",)))
    assert not (tmp_path / "x").exists()


def test_every_claim_names_worlds_and_recipes():
    known = {path.stem for path in recipes_of("sae")}
    for claim in CLAIMS:
        for world, variant in claim.needs:
            assert world in (*WORLDS, NAME) and variant.split(" (")[0] in known, (world, variant)


def test_a_claim_is_seen_by_its_rule_alone():
    def told(abs_topk):
        rows = {"topk": 0.3, "abs_topk": abs_topk, "batch_topk": 0.3}
        worlds = {"bidirectional": {name: {"found": v, "fvu": 0.1} for name, v in rows.items()}}
        return next(a for a in answers(worlds) if "two ends" in a[0])

    assert told(0.5)[1] == "seen" and told(0.35)[1] == "not seen" and "abs_topk 0.500" in told(0.5)[2]
