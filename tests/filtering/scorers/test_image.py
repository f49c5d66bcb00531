"""Filtering by a query with an SAE of images alone: no captions, at a site of patches, and what is refused."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmsae import SAE, load_pair
from mmsae.filtering.command import filter_command
from mmsae.metrics.concepts.inverted import InvertedLists
from mmsae.metrics.concepts.query import evaluate, write_query
from mmsae.metrics.pairs.item_codes import max_pool
from mmsae.options import call
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import FaultLog, ShardWriter, expand, read_shard, unit_batches
from mmsae.types import IMAGE, Codes, InputError
from tests.helpers.evaluation import png, save_host, save_sae, write_colours
from tests.helpers.filtering import QUIET, make_host, make_shards, results, tree

SITE = "visual.transformer.resblocks.1:out[patches]"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of colours without captions, some of them broken, and an SAE on patches."""
    root = tmp_path_factory.mktemp("images")
    host = save_host(root / "host")
    write_colours(root / "captioned", 60, 0)
    with ShardWriter(root / "shards", "bare", per_shard=20) as w:
        for path in expand(str(root / "captioned")):
            for s in read_shard(path, FaultLog(), need=(), decode=False):
                w.write(s.key, {"png": s.raw["png"], "json": {"uid": s.uid}})
        w.write("broken", {"png": b"no image"})
    return root, save_sae(root / "sae", host, SITE)


@pytest.fixture(scope="module")
def codes(place):
    root, path = place
    sae, host = load_pair(path, device="cpu")
    parts = []
    for b in unit_batches(expand(str(root / "shards")), batch_size=8, workers=0, **host.reading({IMAGE})):
        if not b.batch.uids:  # what is left of a tar whose last image is broken
            continue
        (rows,) = host.read(b.batch, [sae.sites[IMAGE]])
        parts.append(max_pool(sae.encode(rows.x, IMAGE), rows.item).codes(len(b.batch.uids), IMAGE).to_dense())
    return InvertedLists.of(Codes(torch.cat(parts), None, sae.d_sae, IMAGE))


@pytest.fixture(scope="module")
def query(place, codes):
    rare = sorted(range(64), key=lambda j: abs(len(codes.row(j)[0]) - 30))
    text = f"#{rare[0]} & ~(image:#{rare[1]} > .5)"
    assert 3 < evaluate(text, {IMAGE: codes}, holds=True).sum() < 57
    return text, str(write_query(place[0] / "query.json", text, sae_fingerprint(SAE.from_pretrained(place[1]))))


def run(place, out, **more):
    root, sae = place
    return Path(call(filter_command, sae=sae, shards=str(root / "shards"), out=str(out), **QUIET | more))


def test_images_of_which_the_query_holds_are_kept_without_captions(place, codes, query, tmp_path):
    out = run(place, tmp_path / "out", query=query[1])
    table = pq.read_table(out / "scores.parquet").to_pydict()
    holds = evaluate(query[0], {IMAGE: codes}, holds=True)
    assert table["kept"] == holds.tolist() and len(holds) == 60 and set(table["caption"]) == {""}
    assert np.abs(np.array(table["query"]) - evaluate(query[0], {IMAGE: codes})).max() < 0.05
    assert all(table["image_only"]) and not any(table["text_only"])
    on = [len(codes_of) for codes_of in table["image_only"]]
    assert max(on) <= 5 and min(table["latents_on"]) >= max(1, min(on))
    written = [s for p in expand(str(out / "shards")) for s in read_shard(p, FaultLog(), need=(), decode=False)]
    kept = [u for u, k in zip(table["uid"], table["kept"], strict=True) if k]
    assert [s.uid for s in written] == kept and written[0].raw["png"][:4] == b"\x89PNG"
    r = results(out)
    assert r["job"]["score"] == "query" and r["faults"]["dropped"] == 1
    assert "fit the query" in (out / "report.html").read_text()


@pytest.mark.long
def test_two_processes_write_the_same(place, query, tmp_path):
    one, two = (run(place, tmp_path / str(n), query=query[1], devices=n, report=False) for n in (1, 2))
    assert {k: v for k, v in tree(one).items() if "results" not in k} == {
        k: v for k, v in tree(two).items() if "results" not in k
    }


def test_a_random_share_and_a_covering_set_can_be_chosen_too(place, tmp_path):
    assert results(run(place, tmp_path / "random", score="random", keep=0.5, report=False))["kept"] == 30
    chosen = results(run(place, tmp_path / "cover", score="random", keep=0.2, select="cover", report=False))
    covered = chosen["selection"]["latents_covered"]
    assert chosen["kept"] == 12 and covered["selected"] >= covered["random"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "pair scores need image and text: choose by --query or --score random"),
        ({"score": "clip"}, "pair scores need image and text"),
        ({"score": "random", "select": "cover", "select_on": "text"}, "select_on text are of pairs"),
        ({"score": "random", "calibration": "SHARDS"}, "calibration, weights and select_on text are of pairs"),
    ],
)
def test_what_is_of_pairs_is_refused(place, options, why, tmp_path):
    options = {k: str(place[0] / "shards") if v == "SHARDS" else v for k, v in options.items()}
    with pytest.raises(InputError, match=why):
        run(place, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_an_sae_of_pairs_reads_captions_as_before(tmp_path):
    make_host(tmp_path)
    make_shards(tmp_path / "shards", 32)
    with ShardWriter(tmp_path / "shards", "x") as w:
        w.write("bare", {"png": png(np.zeros((8, 8, 3), np.uint8))})
    sae = {"sae": str(tmp_path / "clip-sae"), "shards": str(tmp_path / "shards"), "out": str(tmp_path / "out")}
    out = Path(call(filter_command, **sae, **QUIET, report=False))
    assert results(out)["faults"]["dropped"] == 1 and "clip" in results(out)["scores"]
