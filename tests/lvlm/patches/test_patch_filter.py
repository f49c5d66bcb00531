"""The patch filter: hand-computed scores, which cells go black, and an oracle that knows what the model needs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmsae.cli import main
from mmsae.hosts import load_host
from mmsae.lvlm.options import PatchChoice
from mmsae.lvlm.patches.command import patches
from mmsae.lvlm.patches.patch_filter import PatchFilter, blacken, is_right, kept_patches, token_scores
from mmsae.lvlm.weights.file import CrossModalFile
from mmsae.options import call
from mmsae.types import Codes, InputError
from tests.helpers.lvlm import llava_next
from tests.helpers.lvlm_jobs import make_host, make_sae, sample, shard


def test_scores_of_tokens_by_hand():
    z = torch.tensor([[0.0, 3.0, 0.0, 1.5, 0.0], [2.5, 0.0, 0.0, 0.2, 4.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    w = torch.tensor([0.2, 0.3, float("nan"), 0.5, -0.1])
    partners = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    got = token_scores(Codes(z, None, 5), w, partners)
    assert got["l0"].tolist() == [2, 3, 0] and got["l1"].tolist() == pytest.approx([4.5, 6.7, 0])
    assert got["co_l0"].tolist() == [1, 1, 0] and got["cos"].tolist() == pytest.approx([0.8, 0.6, 0])
    above = token_scores(Codes(z, None, 5), w, partners, delta=1.0)
    assert above["l0"].tolist() == [2, 2, 0] and above["cos"].tolist() == pytest.approx([0.8, 0.1, 0])
    sparse = Codes(torch.tensor([[3.0, 1.5], [4.0, 2.5]]), torch.tensor([[1, 3], [4, 0]]), 5)
    assert token_scores(sparse, w)["cos"].tolist() == pytest.approx([0.8, 0.1])


def test_kept_patches():
    scores, tie = np.array([[0.3, 0.1], [0.9, 0.2]]), np.array([[0.0, 1.0], [2.0, 3.0]])
    assert kept_patches(scores, 0.5, tie).tolist() == [[True, False], [True, False]]
    # as published, where scores differ: at or below the percentile goes black
    for keep in (0.25, 0.5, 0.75):
        assert np.array_equal(
            kept_patches(scores, keep, tie), scores > np.sort(scores.ravel())[int(4 * (1 - keep)) - 1]
        )
    assert kept_patches(scores, 1.0, tie).all()
    assert kept_patches(np.ones((2, 2)), 0.5, tie).tolist() == [[True, True], [False, False]]  # ties: as drawn


def test_cells_go_black():
    picture = Image.new("RGB", (10, 6), (200, 100, 50))
    seen = np.asarray(blacken(picture, np.array([[True, False], [False, True], [True, True]])))
    assert (seen[:2, 5:] == 0).all() and (seen[2:4, :5] == 0).all() and (seen == 0).all(2).sum() == 20
    assert np.array_equal(np.asarray(blacken(picture, np.ones((3, 2), bool))), np.asarray(picture))


def test_right_answers():
    assert is_right("Yes, there is.", "yes") and is_right("no", "No.") and not is_right("yes", "no")
    assert not is_right("", "yes") and not is_right("yesterday", "yes") and is_right("a red circle .", "a red circle")


def asker(host, sae, weights=None, **more):
    choice = PatchChoice(**{"keep": (0.5,), "scores": ("cos",), "max_new_tokens": 2} | more)
    return PatchFilter(host, sae, choice, None if weights is None else CrossModalFile(weights, 0.0, {}, {}))


def test_maps_are_the_mean_of_base_and_tile(tmp_path):
    host = load_host(llava_next(tmp_path / "next"))
    sae = make_sae(host, d_sae=48, k=12)
    w = torch.rand(48)
    batch = host.collate([sample(0, "is there a red circle ?", size=(40, 24)), sample(1, "yes ?", size=(24, 40))])
    tokens = host.capture(batch, "layers.1:out")
    z = sae.encode(tokens.x["image"], "image").to_dense()
    for grid, found in zip(host.grid(batch), asker(host, sae, w).maps(batch), strict=True):
        own = tokens.item["image"] == grid.item
        at = {int(p) - grid.start: row > 0 for p, row in zip(tokens.position["image"][own], z[own], strict=True)}
        text = sae.encode(tokens.x["text"][tokens.item["text"] == grid.item], "text").to_dense()
        said = (text > 0).any(0)
        for name, each in {"cos": w, "co_l0": said.float()}.items():
            base, tile = (
                torch.tensor([[float(each[at[int(o)]].sum()) for o in r] for r in g]) for g in grid.layout.grids
            )
            want = (base + torch.nn.functional.adaptive_avg_pool2d(tile[None], base.shape)[0]) / 2
            np.testing.assert_allclose(found[name], want.numpy(), rtol=1e-5)


def test_a_score_that_knows_keeps_the_answer_and_its_opposite_loses_it(tmp_path, monkeypatch):
    """The model: says yes where the middle cell has any colour. The oracle's score is high there, its opposite low."""
    host = make_host(tmp_path)
    sae = make_sae(host)

    def answer(batch, **_):
        pixels = batch.inputs["pixel_values"]
        cells = pixels[:, :, 8:16, 8:16].flatten(2)
        return ["no" if painted else "yes" for painted in (cells.amax(2) == cells.amin(2)).all(1).tolist()]

    monkeypatch.setattr(host, "answer", answer)
    knows = np.zeros((3, 3))
    knows[1, 1] = 1
    ask = asker(host, sae, scores=("cos", "l0"), keep=(0.5, 0.12))
    maps = {"cos": knows, "l0": -knows, "random": np.random.default_rng(0).random((3, 3))}
    monkeypatch.setattr(PatchFilter, "maps", lambda self, batch: [maps] * len(batch.uids))
    rows = [sample(i, "is there a red circle ?", meta={"answer": "yes"}) for i in range(4)]
    found = ask.ask(rows)
    assert all(found["all"]) and all(found["cos/0.5"]) and all(found["cos/0.12"])
    assert not any(found["l0/0.5"]) and not any(found["l0/0.12"])


def test_everything_kept_is_the_picture_itself(tmp_path):
    host = make_host(tmp_path)
    rows = [sample(i, "is there a red circle ?", meta={"answer": "yes"}, size=(48, 24)) for i in range(3)]
    asked = []
    real = host.answer
    host.answer = lambda batch, **kw: (asked.append(batch.inputs["pixel_values"]), real(batch, **kw))[1]
    found = asker(host, make_sae(host), scores=("l0", "random"), keep=(1.0,)).ask(rows)
    assert found["all"] == found["l0/1"] == found["random/1"]
    whole = host.collate(rows).inputs["pixel_values"]
    assert all(torch.allclose(pixels, whole, atol=1e-2) for pixels in asked)  # to the rounding of a colour


def test_the_command(tmp_path, capsys):
    host = make_host(tmp_path)
    make_sae(host).save_pretrained(tmp_path / "sae")
    (tmp_path / "shards").mkdir()
    for i in range(2):
        shard(tmp_path / "shards" / f"{i}.tar", 4, start=4 * i)
    args = {"sae": str(tmp_path / "sae"), "shards": str(tmp_path / "shards"), "device": "cpu", "progress": False}
    with pytest.raises(InputError, match="score cos needs cross-modal weights"):
        call(patches, **args, out=str(tmp_path / "p"))
    with pytest.raises(InputError, match="no score 'x'"):
        call(patches, **args, out=str(tmp_path / "p"), scores=["x"])
    with pytest.raises(InputError, match="host timm:resnet18 is no vision-language model"):  # not: give --weights
        call(patches, **args | {"host": "timm:resnet18"}, out=str(tmp_path / "p"))
    with pytest.raises(InputError, match=r"no sample of .* has an answer of \['perhaps'\]"):
        call(patches, **args, out=str(tmp_path / "q"), scores=["l0"], answers=["perhaps"])
    cli = ["--sae", args["sae"], "--shards", args["shards"]]
    main(["weights", *cli, "--out", str(tmp_path / "w"), "--samples", "null", "--n-side", "2", "--progress", "false"])
    main(["patches", *cli, "--weights", str(tmp_path / "w"), "--out", str(tmp_path / "p"), "--keep", "0.5", "0.25"])
    found = json.loads((tmp_path / "p" / "results.json").read_text())
    assert found["questions"] == 8 and len(found["table"]) == 1 + 6 * 2
    assert (tmp_path / "p" / "patches.png").stat().st_size > 1000 and "| 25% |" in capsys.readouterr().out
    again = call(patches, **args, weights=str(tmp_path / "w"), out=str(tmp_path / "p"), keep=[0.5, 0.25])
    assert again["table"] == found["table"]
    with pytest.raises(InputError, match="its seed is 0 there and 1 here"):
        call(patches, **args, weights=str(tmp_path / "w"), out=str(tmp_path / "p"), keep=[0.5, 0.25], seed=1)
