"""Evidence of tokens of one sequence of image and text, on LLaVA, LLaVA-NeXT and Qwen-VL; and of a text tower."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmsae.hosts import load_host
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.evidence.job import collect_evidence
from mmsae.interpret.evidence.options import Evidencing
from mmsae.options import SAERun
from mmsae.shards import ShardWriter, expand, unit_batches
from tests.helpers.evaluation import png, save_host, save_sae
from tests.helpers.lvlm import llava, llava_next, picture, qwen
from tests.helpers.lvlm_jobs import QUESTIONS, make_sae

RUN = SAERun(device="cpu", workers=0, batch_size=5, progress=False)
CHOICE = Evidencing(n_top=5, quantiles=3, each=4, negatives=6, min_items=4)
SIZES = [(24, 24), (60, 24), (24, 48)]


def shards(folder, n=24):
    with ShardWriter(folder, "s", per_shard=14) as w:
        for i in range(n):
            fields = {"png": png(np.asarray(picture(i, SIZES[i % 3]))), "txt": QUESTIONS[i % 4]}
            w.write(f"s{i:03d}", {**fields, "json": {"question": QUESTIONS[i % 4], "uid": f"{i:032x}"}})
    return str(folder)


@pytest.fixture(scope="module", params=[llava, llava_next, qwen], ids=["llava", "next", "qwen"])
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("lvlm")
    host = load_host(request.param(root / "host"))
    sae = make_sae(host)
    data = shards(root / "data")
    collect_evidence(sae, data, root / "out", host, CHOICE, RUN)
    return host, sae, data, Evidence(root / "out")


def test_the_rows_of_every_item_are_its_content_tokens(made):
    host, sae, data, e = made
    assert e.modalities == ["image", "text"] and e.about["embedder"] == {}
    assert e.about["hard_negatives"] == dict.fromkeys(("image", "text"), "cosine of pooled codes")
    seen = {m: 0 for m in e.modalities}
    fired = {m: np.zeros(sae.d_sae, np.int64) for m in e.modalities}
    for unit in unit_batches(expand(data), None, None, 5, collate=host.collate):
        tokens = host.capture(unit.batch, sae.sites)
        for m in e.modalities:
            rows = ~tokens.special[m]
            z = sae.encode(tokens.x[m][rows], m).to_dense().detach().numpy()
            item = tokens.item[m][rows].numpy()
            for i, uid in enumerate(unit.batch.uids):
                own = e.items.uid.index(uid)
                pooled = z[item == i][np.abs(z[item == i]).argmax(0), np.arange(sae.d_sae)]
                latents, values = e.codes(m).row(own)
                assert latents.tolist() == np.flatnonzero(pooled).tolist()
                np.testing.assert_allclose(values, pooled[latents], rtol=1e-4)
            seen[m] += len(item)
            fired[m] += (z != 0).sum(0)
    for m in e.modalities:
        assert e.about["latents"][m]["rows"] == seen[m] and (e.stats(m).fired_rows == fired[m]).all()


def test_heat_of_image_tokens_is_that_of_the_hosts_own_grid(made):
    host, sae, data, e = made
    shapes = set()
    for unit in unit_batches(expand(data), None, None, 5, collate=host.collate):
        tokens, n = host.capture(unit.batch, sae.sites), 0
        for grid in host.grid(unit.batch):
            own = e.items.uid.index(unit.batch.uids[grid.item])
            if e.tokens(own, "image") is None:
                continue
            base, *tiles = grid.layout.grids
            shapes.add(tuple(base.shape))
            assert e.grid_of(own) == tuple(base.shape)
            at = tokens.item["image"] == grid.item
            z = sae.encode(tokens.x["image"][at], "image").to_dense().detach()
            where = (tokens.position["image"][at] - grid.start).tolist()
            table = torch.zeros(grid.layout.length, sae.d_sae)
            table[where] = z
            for j in np.unique(e.tokens(own, "image").latent)[:6]:
                heat = e.heat(own, j)
                expected = table[base, j].numpy()
                for tile in tiles:
                    fine, (rows, cols) = table[tile, j].numpy(), base.shape
                    for r in range(tile.shape[0]):
                        for c in range(tile.shape[1]):
                            cell = r * rows // tile.shape[0], c * cols // tile.shape[1]
                            if abs(fine[r, c]) > abs(expected[cell]):
                                expected[cell] = fine[r, c]
                np.testing.assert_allclose(heat, expected, rtol=1e-4, atol=1e-6)
            n += 1
        assert n or not unit.batch.uids
    assert (e.grid("image").rows, e.grid("image").cols) == tuple(np.max(list(shapes), 0))
    top = e.top("image")
    assert (top.position[top.item >= 0] < e.grid("image").places).all()


def test_words_are_the_text_and_lie_at_the_positions_of_the_tokens(made):
    _, _, _, e = made
    n = 0
    for i in range(e.n):
        words = e.words(i)
        if words is not None:
            assert "".join(words.text).strip() == e.items.caption[i]
            assert set(e.tokens(i, "text").position.tolist()) <= set(words.position.tolist())
            assert (np.diff(words.position) > 0).all()
            n += 1
    assert n > 10 and e.words(0, "image") is None


def test_the_box_is_that_of_the_processor(made):
    host, _, _, e = made
    crops = type(host.processor).__name__ == "LlavaProcessor"
    for i in range(e.n):
        left, top, right, bottom = e.items.view[i]
        width, height = SIZES[int(e.items.uid[i], 16) % 3]
        if crops:
            side = min(width, height)
            box = ((width - side) / 2 / width, (height - side) / 2 / height)
            assert np.allclose((left, top, 1 - right, 1 - bottom), (*box, *box), atol=0.03)
        else:
            assert (left, top, right, bottom) == (0, 0, 1, 1)
        assert Image.open(io.BytesIO(e.thumbnail(i))).size == (width, height)


def test_tokens_of_a_text_tower_have_their_words(tmp_path):
    host, data = save_host(tmp_path / "host"), shards(tmp_path / "data")
    sae = save_sae(tmp_path / "sae", host, site="transformer.resblocks.1:out[mask]", modalities=("text",))
    collect_evidence(sae, data, tmp_path / "out", choice=CHOICE, run=RUN)
    e = Evidence(tmp_path / "out")
    assert e.modalities == ["text"] and e.about["images"] and e.grid("text").places > 3
    for i in range(e.n):
        words = e.words(i)
        if words is not None:
            assert 0 not in words.position and len(words.text) <= 8  # neither BOS nor EOS
            known = "is there a red circle ?".split()
            assert "".join(words.text).split()[:2] == [w if w in ("a", "red", "circle") else "<unk>" for w in known[:2]]
            assert e.thumbnail(i) is not None
