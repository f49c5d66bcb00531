"""Filtering by SAE-V's scores on a tiny LLaVA with random weights."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmsae.filtering.command import filter_command
from mmsae.options import call
from mmsae.types import InputError
from tests.helpers.filtering import filter_shards, results, tree
from tests.helpers.lvlm_jobs import make_host, make_sae, shard


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("lvlm")
    host = make_host(root)
    sae = make_sae(host).save_pretrained(root / "sae")
    (root / "shards").mkdir()
    for i in range(2):
        shard(root / "shards" / f"{i}.tar", 6, 6 * i)
    return {
        "sae": str(sae), "host": host.hint, "shards": str(root / "shards"), "batch_size": 4, "workers": 0,
        "progress": False, "device": "cpu",
    }  # fmt: skip


def test_kept_by_cross_modal_weights_with_reasons(job, tmp_path):
    out = Path(call(filter_command, **job, out=str(tmp_path / "a"), score="cos_code"))
    assert {"weights.json", "latent_weights.safetensors", "report.html", "uids.npy"} <= set(tree(out))
    table = pq.read_table(out / "scores.parquet").to_pydict()
    assert {"cos_code", "cos_algorithm", "cos_mean", "l0", "l1", "co_l0", "co_l1", "text_only"} <= set(table)
    assert sum(table["kept"]) == 6 == results(out)["kept"]
    assert "cross-modal weight (1 where" in (out / "report.html").read_text()
    # the weights that were fitted, given: the same scores
    again = filter_shards(**job, out=str(tmp_path / "b"), score="cos_code", weights=str(out))
    assert tree(again)["scores.parquet"] == tree(out)["scores.parquet"]


def test_answers_are_scored_only_where_asked(job, tmp_path):
    tables = {}
    for text in ("question", "question+answer"):
        out = filter_shards(**job, out=str(tmp_path / text), score="cos_code", text=text)
        tables[text] = pq.read_table(out / "scores.parquet").to_pydict()
        assert json.loads((out / "weights.json").read_text())["text"] == text == results(out)["job"]["text"]
    more = [b - a for a, b in zip(*(t["n_text"] for t in tables.values()), strict=True)]
    assert more == [1.0] * 12  # "yes"
    assert tables["question"]["l1"] != tables["question+answer"]["l1"]


def test_counts_need_no_weights(job, tmp_path):
    out = filter_shards(**job, out=str(tmp_path / "a"), score="co_l0", select="cover", keep=0.25)
    assert "weights.json" not in tree(out) and results(out)["selection"]["latents_covered"]["selected"] > 0


def test_the_control_is_random(job, tmp_path):
    table = pq.read_table(filter_shards(**job, out=str(tmp_path / "a"), score="random") / "scores.parquet").to_pydict()
    by = {k: [r for r, kept in zip(table["random"], table["kept"], strict=True) if kept is k] for k in (True, False)}
    assert len(by[True]) == 6 and max(by[False]) < min(by[True])


def test_scores_of_pairs_are_refused(job, tmp_path):
    with pytest.raises(InputError, match="that of a CLIP-like host"):
        filter_shards(**job, out=str(tmp_path / "a"), score="pair_code")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_give_the_same_files_as_one(job, tmp_path):
    given = {**job, "score": "cos_code", "text": "question+answer", "select": "cover"}
    one, two = (call(filter_command, **given, out=str(tmp_path / str(n)), devices=n) for n in (1, 2))
    assert tree(one) == tree(two)
