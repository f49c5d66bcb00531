import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsae.errors import InputError
from mmsae.interpret.scenarios.command import scenarios
from mmsae.options import call
from mmsae.shards import FaultLog, expand, read_shards
from mmsae.world.generator.scene import CONCEPTS
from mmsae.world.generator.shards import write_world
from tests.helpers.scenarios import oracle_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    data, _ = oracle_world(root / "e", 2000, 3)
    rng = np.random.default_rng(0)
    bad = data.concepts[:, CONCEPTS.index("purple")] & data.concepts[:, CONCEPTS.index("dark")]
    failed = rng.random(2000) < np.where(bad, 0.7, 0.03)
    uids = [f"{i:032x}" for i in range(2000)]
    pq.write_table(pa.table({"uid": uids, "correct": ~failed}), root / "failures.parquet")
    return root, data, failed


def test_everything_is_written(world, tmp_path, capsys):
    root, data, failed = world
    out = tmp_path / "s"
    found = call(scenarios, str(root / "e"), str(out), ["red & circle", "#3 & ~dark"], str(root / "failures.parquet"),
                 present=0, dense=0.5, cards=5)  # fmt: skip
    about = json.loads((out / "scenarios.json").read_text())
    assert found["out"] == str(out) and {k: found[k] for k in about} == about
    assert (
        about["queries"][0]["support"]
        == (data.concepts[:, CONCEPTS.index("red")] & data.concepts[:, CONCEPTS.index("circle")]).sum()
    )
    assert about["slices"][0]["name"] in ("purple & dark", "dark & purple")
    assert about["failures"]["shuffled"] == 0
    cards = [json.loads(line) for line in (out / "cards.jsonl").read_text().splitlines()]
    assert len(cards) == 10 and {c["query"] for c in cards} == {q["query"] for q in about["queries"]}
    rows = pq.read_table(out / "situations.parquet").to_pylist()
    assert {r["kind"] for r in rows} == {"conjunction", "failure"}
    items = pq.read_table(out / "items.parquet").to_pylist()
    assert all(i["failed"] == bool(failed[int(i["uid"], 16)]) for i in items)
    page = (out / "report.html").read_text()
    assert (
        "purple &amp; dark" in page and "Where the model fails" in page and "data:image" in page and "#-1" not in page
    )
    assert "holds of" in capsys.readouterr().out


def test_what_is_too_common_to_be_mined_is_said_wherever_the_result_is_read(world, tmp_path, capsys):
    """Here "dark" is, without which the slice cannot be found: an empty result is none of the model's doing."""
    root, _, _ = world
    about = call(scenarios, str(root / "e"), str(tmp_path / "s"), failures=str(root / "failures.parquet"), present=0,
                 dense=0.2)  # fmt: skip
    dense = about["left_out"]["dense"]
    assert "dark" in dense and all("dark" not in s["name"] for s in about["slices"])
    said = f"{len(dense)} that are present in more than 20% of the items (--dense): {dense[0]}, "
    page = (tmp_path / "s" / "report.html").read_text()
    assert said in capsys.readouterr().out and page.count(said) == 2
    assert json.loads((tmp_path / "s" / "scenarios.json").read_text())["left_out"] == about["left_out"]


def test_without_names_queries_are_answered_and_mining_says_what_it_lacks(world, tmp_path):
    root, _, _ = world
    names = tmp_path / "none.json"
    names.write_text("{}")
    given = {"out": str(tmp_path / "s"), "names": str(names), "progress": False}
    found = call(scenarios, str(root / "e"), query=["#3"], **given)
    assert "0 are named" in found["not_mined"] and found["queries"][0]["support"] > 0
    with pytest.raises(InputError, match="0 are named"):
        call(scenarios, str(root / "e"), **given)


def test_bad_input_is_said_before_anything_is_written(world, tmp_path):
    root, _, _ = world
    pq.write_table(pa.table({"uid": ["x"], "wrong": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"uid": ["x"], "failed": [1]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("no")
    cases = [
        ({"failures": str(tmp_path / "a.parquet")}, "needs the columns uid and failed"),
        ({"failures": str(tmp_path / "b.parquet")}, "1 uids, and none is of the 2,000 items"),
        ({"failures": str(tmp_path / "c.parquet")}, "cannot be read as parquet"),
        ({"query": ["nothing like it"]}, "no latent is named"),
        ({"suite": 3}, "--shards names the shards"),
        ({"order": 5}, "order is 5"),
        ({"query": ["count(red) >= 1"]}, "is of areas"),
    ]
    for options, said in cases:
        with pytest.raises(InputError, match=said):
            call(scenarios, str(root / "e"), out=str(tmp_path / "s"), progress=False, **options)
    assert not (tmp_path / "s").exists()
    with pytest.raises(InputError, match="no folder of evidence"):
        call(scenarios, str(tmp_path))


def test_a_suite_has_failing_situations_and_their_siblings(tmp_path):
    oracle_world(tmp_path / "e", 2000, 3)
    data = write_world(tmp_path / "shards", 2000, 3, progress=False)
    items = pq.read_table(tmp_path / "e" / "items.parquet")
    at = items.column_names.index("uid")
    half = pa.array(np.where(np.arange(2000) // 2 % 2, "train", "test"))  # siblings in one half
    items = items.set_column(at, "uid", pa.array(data.uids))
    items = items.set_column(items.column_names.index("half"), "half", half)
    pq.write_table(items, tmp_path / "e" / "items.parquet")
    bad = data.concepts[:, CONCEPTS.index("purple")] & data.concepts[:, CONCEPTS.index("dark")]
    pq.write_table(pa.table({"uid": data.uids, "failed": bad}), tmp_path / "f.parquet")
    (tmp_path / "seen.txt").write_text("\n".join(data.uids[::8]))
    options = {"present": 0, "dense": 0.5, "suite": 10, "shards": [str(tmp_path / "shards")], "pair_field": "pair",
               "exclude": str(tmp_path / "seen.txt"), "progress": False}  # fmt: skip
    found = call(scenarios, str(tmp_path / "e"), str(tmp_path / "s"), failures=str(tmp_path / "f.parquet"), **options)
    assert found["suite"]["items"] == 10 == found["suite"]["controls"] and found["suite"]["minimal_pairs"] >= 5
    seen = set(data.uids[::8])
    samples = list(read_shards(expand(str(tmp_path / "s" / "suite")), FaultLog()))
    assert len(samples) == found["suite"]["samples"] and not seen & {s.uid for s in samples}
    for s in samples:
        both = {"purple", "dark"} <= set(s.meta["concepts"])
        assert all((said["role"] == "slice") == both for said in s.meta["suite"])
