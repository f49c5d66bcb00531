"""``mmsae bench multimodal`` at smoke size, and its rules."""

import json

import pytest

from mmsae import InputError
from mmsae.bench.command import PhotographsBench, SAEBench, bench
from mmsae.bench.multimodal.data import Photographs
from mmsae.bench.multimodal.goals import reached
from mmsae.bench.multimodal.run import (
    CONTROLLED,
    FEW,
    Bench,
    PairSizes,
    Place,
    bench_multimodal,
    chosen_strength,
    default_for_pairs,
)
from mmsae.bench.sized import CONTROLS, sae_recipes
from mmsae.bench.stages import stages_of
from mmsae.world.generator.data import generate
from mmsae.world.generator.scene import SHAPES
from mmsae.world.generator.shards import write_samples

RANDOM = f"{CONTROLLED} (untrained)"
TINY = PairSizes(pairs=(400, 120), clip_steps=2, steps=30, world=((24, 4),))
NAMES = ["paired_topk", "shared_topk", "vl_sae", "dual_topk"]
CENTRED = "vl_sae (centred)"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("multimodal")
    return root, bench_multimodal(root, TINY, NAMES, (0,), progress=False)


def test_what_it_writes(done):
    root, found = done
    (place,) = found["tables"]
    assert place == "world, F 24, k 4" and {n for n in found["tables"][place] if "frozen" not in n} == {
        *NAMES,
        CENTRED,
        RANDOM,
    }
    table = found["tables"][place]
    assert table["paired_topk"]["fvu_image"] < table[RANDOM]["fvu_image"]
    assert table[CENTRED]["fvu_image"] != table["vl_sae"]["fvu_image"] and table[CENTRED]["choice_l0"] <= 4
    frozen = [n for n in table if "frozen" in n]
    assert len(frozen) == 3 and all(table[n]["fvu_image"] < table[RANDOM]["fvu_image"] for n in frozen)
    assert table["paired_topk"]["strength"] in (0.1, 0.3, 1.0, 3.0) and table["shared_topk"]["strength"] == 1
    assert len(list((root / "strengths").glob("*paired_topk*"))) == 4
    assert not list((root / "strengths").glob("*shared_topk*"))  # nothing couples
    assert all((root / name).stat().st_size for name in ("front.png", "report.html", "table.md"))
    assert json.loads((root / "results.json").read_text())["default"] == found["default"]


def test_it_goes_on(done, monkeypatch):
    root, found = done

    def never(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(Bench, "train", never)
    again = bench_multimodal(root, TINY, NAMES, (0,), progress=False)
    assert all(again[k] == found[k] for k in ("tables", "conditions", "default"))


def test_conditions_take_the_strengths_of_the_world_and_decide_nothing(done):
    root, found = done
    names = ["uncentred, F 24, k 4", "partial captions, F 24, k 4", "noisy host, F 24, k 4"]
    assert list(found["conditions"]) == names
    asked = {place: [n for n in NAMES if n in FEW or place.startswith("uncentred")] for place in names}
    assert {place: sorted(table) for place, table in found["conditions"].items()} == {
        place: sorted(some) for place, some in asked.items()
    }
    (world,) = found["tables"].values()
    for place in names:
        for name in asked[place]:
            row = found["conditions"][place][name]
            assert row["strength"] == world[name]["strength"] and 0 <= row["wrong_weighted"] <= 1
    assert len(list((root / "strengths").iterdir())) == 4
    assert all(0 < row["recall_host"] <= 1 for row in world.values())
    table = (root / "table.md").read_text()
    assert all(f"### {place}" in table for place in (*found["tables"], *names)) and "host, centred" in table
    assert set(found["default"]["candidates"]) <= set(NAMES)


def test_uncentred_inputs_have_one_bias_and_split_the_dictionary(done):
    _, found = done
    centred, uncentred = (
        found[k][f"{place}, F 24, k 4"] for k, place in (("tables", "world"), ("conditions", "uncentred"))
    )
    assert uncentred["shared_topk"]["bimodal_energy"] < 0.1 < centred["shared_topk"]["bimodal_energy"]


def test_the_strength_is_the_highest_recall_without_warning_or_much_error():
    tried = {
        0.1: {"recall": 0.5, "fvu": 0.10, "warnings": 0},
        0.3: {"recall": 0.7, "fvu": 0.12, "warnings": 0},
        1.0: {"recall": 0.8, "fvu": 0.13, "warnings": 0},  # more than 1.25 times the lowest
        3.0: {"recall": 0.9, "fvu": 0.05, "warnings": 1},
    }
    assert chosen_strength(tried) == 0.3
    assert chosen_strength({3.0: tried[3.0]}) == 3.0


def test_the_default_is_chosen_by_rows_that_are_not_reported():
    def row(recall, fvu, warnings=0.0):
        return {"choice_recall": recall, "choice_fvu": fvu, "choice_warnings": warnings, "recall": 0.0}

    first = {"a": row(1.0, 0.2), "b": row(0.96, 0.1), "c": row(0.5, 0.01), "d": row(1.0, 0.01, 1.0), RANDOM: row(1, 0)}
    assert default_for_pairs({"x": first})["chosen"] == "b"
    second = {"a": row(1.0, 0.2), "b": row(0.9, 0.1)}
    found = default_for_pairs({"x": first, "y": second})
    assert found["chosen"] == "a" and found["candidates"]["b"]["tables"] == 1
    assert found["candidates"]["a"]["fvu"] == pytest.approx(1.5)


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="there is no topk for pairs"):
        bench("multimodal", out=str(tmp_path / "x"), saes=SAEBench(variants=("topk",)))
    with pytest.raises(InputError, match="photographs need --train, --test and --host"):
        bench("multimodal", out=str(tmp_path / "x"), photographs=PhotographsBench(train="a.tar"))
    assert not (tmp_path / "x").exists()


def test_photographs_are_a_table_of_their_own(done, tmp_path):
    root, _ = done
    shards = {}
    for split, n, seed in (("train", 160, 11), ("test", 60, 12)):
        data = generate(n, seed, siblings=False)
        classes = [SHAPES[shape] for shape in data.scenes.objects[:, 0, 0]]
        metas = [{"uid": uid, "class": name} for uid, name in zip(data.uids, classes, strict=True)]
        write_samples(tmp_path / split, split, data.images, [f"a photo of a {c}" for c in classes], metas, per_shard=40)
        shards[split] = str(tmp_path / split / "*.tar")
    seen = Photographs(shards["train"], shards["test"], f"local-dir:{root / 'clip'}", tmp_path / "store", False)
    assert [len(x["image"]) for x in (seen.train, seen.choose)] == [120, 40] and len(seen.prompts) == len(SHAPES)
    stages = stages_of(tmp_path / "run", {}, progress=False)
    bench = Bench(stages, {"paired_topk": sae_recipes()["paired_topk"]}, (0, 1), 20, False)
    table = bench.table(Place("photographs", seen, (16, 3)))
    row = table["paired_topk"]
    assert len(table) == 1 + len(CONTROLS) and row["choice_l0"] <= 3 and "fvu_image_sd" in row
    _, goals = reached({"photographs, F 48, k 4": table}, ["paired_topk"])
    assert goals[0][3].split(":")[0] == f"{row['zero_shot'] / row['zero_shot_host']:.3f}"
