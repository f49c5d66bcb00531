"""Tokens made visible: heat on the processor's grid, cells in the picture, words in context, and the page."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmsae import SAE
from mmsae.cli import main
from mmsae.hosts import load_host
from mmsae.lvlm.tokens import encode_tokens
from mmsae.lvlm.weights.token_view import LatentOnImage, TokenViewer, crop_image, heat_image
from mmsae.metrics.concepts.names import LatentName, write_names
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.types import InputError
from tests.helpers.lvlm import llava, llava_next, qwen, sample
from tests.helpers.lvlm_jobs import make_sae, shard

HOSTS = {"llava": (llava, (48, 24)), "llava_next": (llava_next, (40, 24)), "qwen": (qwen, (40, 24))}


@pytest.fixture(scope="module", params=HOSTS)
def view(request, tmp_path_factory):
    make, size = HOSTS[request.param]
    host = load_host(make(tmp_path_factory.mktemp("view") / request.param))
    sae = make_sae(host, d_sae=48, k=24)
    samples = [sample(0, "is there a red circle ?", size=size), sample(1, "what is left of the blue square", size=size)]
    return request.param, TokenViewer(host, sae, host.sites("layers.1:out"), host.collate, samples), sae, host


def dense(view, sae, host, modality):
    tokens = host.capture(view.batch, "layers.1:out")
    own = tokens.item[modality] == 1
    return tokens.position[modality][own], encode_tokens(sae, tokens)[modality].to_dense()[own]


def test_heat_is_the_activation_on_the_processors_grid(view):
    name, viewer, sae, host = view
    position, z = dense(viewer, sae, host, "image")
    grid = viewer.grids[1]
    latent = int((z > 0).sum(0).argmax())
    at = int(position[z[:, latent].argmax()])
    seen = viewer.image(1, at, latent)
    value = dict(zip(position.tolist(), z[:, latent].tolist(), strict=True))
    maps = [torch.tensor([[value[grid.start + int(o)] for o in row] for row in g]) for g in grid.layout.grids]
    if name == "llava_next":  # two tiles beside each other over one base
        base, fine = maps
        assert fine.shape[1] > base.shape[1]
        want = (base + torch.nn.functional.adaptive_avg_pool2d(fine[None], base.shape)[0]) / 2
    else:
        (want,) = maps
    assert seen.heat.shape == want.shape and torch.allclose(seen.heat, want, atol=1e-5)
    assert seen.value == pytest.approx(value[at], abs=1e-5)
    rows, cols = {"llava": (3, 3), "llava_next": (3, 3), "qwen": (3, 5)}[name]
    assert seen.heat.shape == (rows, cols)


def test_the_cell_is_where_the_token_looks(view):
    name, viewer, _, _ = view
    grid = viewer.grids[1]
    table = grid.layout.grids[-1]
    rows, cols = table.shape
    left, top, right, bottom = viewer.image(1, grid.start + int(table[rows - 1, 1]), 0).box
    assert (left, right) == pytest.approx((1 / cols, 2 / cols)) and (top, bottom) == pytest.approx((1 - 1 / rows, 1))
    if name == "llava_next":
        end_of_row = grid.start + int(grid.layout.breaks[0])
        with pytest.raises(InputError, match=f"position {end_of_row} is no patch"):
            viewer.image(1, end_of_row, 0)
    with pytest.raises(InputError, match="no image token at position 0"):
        viewer.image(1, 0, 0)


def test_the_picture_is_the_one_that_the_grid_lies_on(view):
    name, viewer, _, _ = view
    shown, whole = viewer.image(1, viewer.grids[1].start, 0).shown, np.asarray(viewer.samples[1].image).astype(int)
    if name == "llava":  # cut to the middle square
        assert shown.size == (24, 24) and np.abs(np.asarray(shown).astype(int) - whole[:, 12:36]).max() <= 1
    else:
        assert np.array_equal(np.asarray(shown), whole)


def test_words_are_those_around_the_token(view):
    _, viewer, sae, host = view
    position, z = dense(viewer, sae, host, "text")
    latent = int((z > 0).sum(0).argmax())
    seen = viewer.text(1, int(position[3]), latent)
    assert "".join(seen.words).split() == "what is left of the blue square".split() and seen.words[seen.at] == " of"
    assert seen.values == pytest.approx(z[:, latent].tolist(), abs=1e-5)


def test_colours():
    from PIL import Image

    view = LatentOnImage(
        Image.new("RGB", (20, 10), "white"), torch.tensor([[0.0, 0.0], [0.0, 2.0]]), (0.5, 0.5, 1, 1), 2.0
    )
    drawn = np.asarray(heat_image(view, 40)).astype(int)
    assert drawn.shape == (20, 40, 3) and (drawn[:10] == 255).all() and (drawn[:, :20] == 255).all()
    assert (drawn[10:, 20:, 0] - drawn[10:, 20:, 1] > 100).all()
    silent = np.asarray(heat_image(view._replace(heat=torch.zeros(2, 2)), 40))
    assert (silent == 255).all()
    assert crop_image(view, margin=0).size == (72, 36) and crop_image(view).size == (72, 36)


def test_the_command_writes_the_page(tmp_path):
    host = load_host(llava(tmp_path / "llava"))
    make_sae(host).save_pretrained(tmp_path / "sae")
    (tmp_path / "shards").mkdir()
    for i in range(2):
        shard(tmp_path / "shards" / f"{i}.tar", 6, start=6 * i)
    args = ["--sae", str(tmp_path / "sae"), "--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "w")]
    main(["weights", *args, "--samples", "null", "--n-side", "3", "--progress", "false", "--device", "cpu"])
    page = (tmp_path / "w" / "gallery.html").read_text()
    top = pq.read_table(tmp_path / "w" / "top_tokens.parquet").to_pylist()
    assert {r["modality"] for r in top} == {"image", "text"} and {r["shard"] for r in top} == {"0.tar", "1.tar"}
    assert "Shared, highest weight" in page and "class=peak" in page and page.count("data:image/png") > 20
    assert "grid 3 x 3" in page and "modality index" in page and "lift" in page and "http" not in page.lower()
    before = (tmp_path / "w" / "weights.json").stat().st_mtime_ns
    asked = next(r["latent"] for r in top if r["modality"] == "image")
    same = [*args, "--samples", "null", "--n-side", "3", "--progress", "false", "--device", "cpu"]
    main(["weights", *same, "--latents", str(asked)])  # the page anew, nothing else
    new = (tmp_path / "w" / "gallery.html").read_text()
    assert "Asked for" in new and "Asked for" not in page and f"#{asked}<" in new
    rest = new[new.index('id="shared-highest-weight"') :]
    assert rest == page[page.index('id="shared-highest-weight"') :]  # top tokens come back from their file as they were
    assert (tmp_path / "w" / "weights.json").stat().st_mtime_ns == before
    sae = sae_fingerprint(SAE.from_pretrained(tmp_path / "sae"))
    names = write_names(tmp_path / "names.json", {asked: LatentName("red <b>")}, sae)
    main(["weights", *same, "--latents", str(asked), "--names", str(names)])
    assert f"<h4>red &lt;b&gt; <small>#{asked}</small>" in (tmp_path / "w" / "gallery.html").read_text()
    with pytest.raises(SystemExit) as e:
        main(["weights", *same, "--latents", "48"])
    assert e.value.code == 2
