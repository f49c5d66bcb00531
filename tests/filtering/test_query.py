"""Filtering by a query over concepts, end to end: what is kept, what the columns say, kills, and what is refused."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmsae import SAE
from mmsae.cli import main
from mmsae.filtering.command import filter_command
from mmsae.filtering.scorers.base import ScorerSpec
from mmsae.filtering.scorers.clip import PairReader
from mmsae.metrics.concepts.inverted import InvertedLists
from mmsae.metrics.concepts.query import evaluate, write_query
from mmsae.options import call
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import unit_batches
from mmsae.types import IMAGE, TEXT, Codes
from tests.helpers.filtering import QUIET, filter_shards, make_host, make_shards, results, tree


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("query")
    make_host(root)
    make_shards(root / "shards")
    return root


@pytest.fixture(scope="module")
def codes(root):
    """Codes of both sides, by a plain pass over the shards."""
    reader = PairReader(ScorerSpec(str(root / "clip-sae"), "", "clip", "", "cpu", "fp32", 0, False))
    paths = sorted(map(str, (root / "shards").glob("*.tar")))
    batches = unit_batches(paths, batch_size=8, workers=0, **reader.host.reading((IMAGE, TEXT)))
    read = [reader.read(b.batch).codes for b in batches if b.batch.uids]
    return {m: InvertedLists.of(Codes.stack([c[m] for c in read])) for m in (IMAGE, TEXT)}


@pytest.fixture(scope="module")
def sae(root):
    return sae_fingerprint(SAE.from_pretrained(root / "clip-sae"))


def args(root, **more):
    return {"sae": str(root / "clip-sae"), "shards": str(root / "shards"), **QUIET, **more}


@pytest.fixture(scope="module")
def text(codes):
    """A query that holds of some samples and not of others."""
    near = {m: sorted(range(40), key=lambda j: abs(len(codes[m].row(j)[0]) - 40)) for m in codes}  # fires on half
    text = f"(image:#{near[IMAGE][0]} | image:#{near[IMAGE][1]} > .4) & ~(text:#{near[TEXT][0]} & #{near[TEXT][1]})"
    assert 5 < evaluate(text, codes, holds=True).sum() < 75
    return text


@pytest.fixture(scope="module")
def whole(root, text, sae):
    """An uninterrupted run, with its page."""
    path = write_query(root / "query.json", text, sae, "mine")
    return Path(call(filter_command, **args(root, query=str(path), out=str(root / "whole"))))


def test_what_holds_is_kept_and_scores_are_those_of_the_codes(whole, codes, text):
    table = pq.read_table(whole / "scores.parquet").to_pydict()
    holds, score = evaluate(text, codes, holds=True), evaluate(text, codes)
    assert table["kept"] == table["query_holds"] == holds.tolist()
    assert np.abs(np.array(table["query"]) - score).max() < 0.03  # a rank or two: rows depend on their batch's rounding
    assert not [c for c in table if "." in c]
    r = results(whole)
    assert r["kept"] == holds.sum() == r["query"]["holds"] and r["query"]["name"] == "mine"
    assert r["job"]["keep"] == 1 and r["job"]["query"] == r["query"]["query"] and "query" in r["scores"]
    assert "fit the query" in (whole / "report.html").read_text()


def test_the_query_may_rank_too(root, codes, text, sae, tmp_path):
    path = write_query(tmp_path / "q.json", text, sae)
    out = filter_shards(**args(root, query=str(path), score="query", keep=0.5, out=str(tmp_path / "out")))
    table = pq.read_table(Path(out) / "scores.parquet").to_pydict()
    kept, score, holds = (np.array(table[c]) for c in ("kept", "query", "query_holds"))
    assert kept.sum() == -(-holds.sum() // 2) and (holds | ~kept).all()
    assert score[kept].min() >= score[holds & ~kept].max()


def test_names_stand_for_latents(root, whole, text, sae, tmp_path):
    latent = re.search(r"image:#(\d+)", text)[1]
    (tmp_path / "names.json").write_text(json.dumps({latent: "odd one"}))
    path = write_query(tmp_path / "q.json", text.replace(f"image:#{latent}", 'image:"odd one"', 1), sae)
    options = args(root, query=str(path), names=str(tmp_path / "names.json"), out=str(tmp_path / "out"))
    assert np.array_equal(np.load(Path(filter_shards(**options)) / "uids.npy"), np.load(whole / "uids.npy"))


def test_a_kill_changes_nothing(root, whole, tmp_path):
    out = tmp_path / "out"
    options = args(root, query=str(root / "query.json"), out=str(out), report=True)
    real = os.replace

    def killing(left):
        def replace(a, b):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            real(a, b)

        return replace

    for kill in (9, 4, 3):
        pid = os.fork()
        if pid == 0:
            os.replace = killing([kill])
            filter_shards(**options)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL and not out.exists()
    filter_shards(**options)
    assert tree(out) == tree(whole)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sae": "f" * 32}, "is a query over SAE ffffffffffff, and this is SAE"),
        ({"query": "#1 |"}, "should stand where its end is"),
        ({"query": "#99"}, "asks for latent #99, and the SAE has 40"),
        ({"query": "count(#1) > 2"}, "asks for count, which needs areas"),
        ({"query": "red"}, "no latent is named 'red'"),
        ({"query": "#1 & ~#1"}, "holds of none of the 80 usable samples"),
        ({"query": "text:#1", "select": "cover"}, "with a query samples are chosen by score"),
        ({"score": "query"}, "no --query names a file"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(root, sae, tmp_path, capsys, given, says):
    base = ["--sae", str(root / "clip-sae"), "--shards", str(root / "shards"), "--out", str(tmp_path / "out")]
    base += ["--workers", "0", "--progress", "false", "--device", "cpu"]
    path = write_query(tmp_path / "q.json", "#1", given.get("sae", sae))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"query": given.get("query", "#1")}))
    base += [] if "score" in given else ["--query", str(path)]
    for option in ("score", "select"):
        base += [f"--{option}", given[option]] if option in given else []
    with pytest.raises(SystemExit) as e:
        main(["filter", *base])
    said = capsys.readouterr().err
    assert e.value.code == 2 and says in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
