"""``mmsae evaluate --gallery``: which images are shown, where the frame is, random weights beside, bad input."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from mmsae import load_pair
from mmsae.cli import main
from mmsae.evaluation.card.card import read_card
from mmsae.evaluation.card.command import evaluate
from mmsae.evaluation.card.gallery import DARK, check_host, grid_of, lit, plain
from mmsae.evaluation.card.top_images import purity
from mmsae.metrics.concepts.names import LatentName, write_names
from mmsae.options import call
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import expand, unit_batches
from mmsae.types import InputError
from tests.helpers.evaluation import save_host, save_sae, write_colours

FRAME = (255, 214, 10)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    host = save_host(folder / "host")
    for name, n, seed in (("train", 90, 0), ("test", 30, 1)):
        write_colours(folder / name, n, seed, name)
    suite = {"root": str(folder), "label": "class", "data": {"train": "train", "test": "test"}, "heads": ["top_images"]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    (folder / "bare.yaml").write_text(yaml.safe_dump({**suite, "label": "", "heads": ["core"]}))
    for name, site in (("tokens", "visual.transformer.resblocks.1:out[patches]"), ("pooled", "image.pooled")):
        save_sae(folder / name, host, site)
    return folder


def run(place, sae, suite="suite", gallery=4, **more):
    out = place / f"{sae}_{suite}"
    call(evaluate, str(place / sae), str(place / f"{suite}.yaml"), str(out), gallery=gallery, progress=False, **more)
    html = (out / "gallery.html").read_text()
    cards = [c.split("</article>")[0] for c in html.split('<article class="card">')[1:]]
    return out, html, cards


def test_purity_by_hand():
    x = torch.tensor([[5.0, 0, 1], [4, 0, 2], [3, 1, 3], [2, 0, 4], [0, 0, 5]])
    p = purity(x, torch.tensor([1, 1, 0, -1, 2]), top=3)
    assert p.rows.tolist() == [[0, 1, 2], [2, -1, -1], [4, 3, 2]]
    assert p.count.tolist() == [2, 1, 1] and p.label.tolist() == [1, 0, 0] and p.whole.tolist() == [True, False, True]


def test_tokens_are_lit_and_framed_beside_random_weights(place):
    out, html, cards = run(place, "tokens")
    heads = ["Purest latents of the SAE", "Latents at random of the SAE", "Purest latents of random weights",
             "Latents at random of random weights"]  # fmt: skip
    assert [h for h in re.findall("<h2>(.*?)</h2>", html)] == heads and len(cards) == 16
    assert all(c.count("data:image/jpeg;base64") == 9 for c in cards) and 'src="http' not in html
    assert (
        all("of tokens" in c and re.search(r"\d of 9 (red|green|blue)", c) for c in cards) and "frame is around" in html
    )
    # the first image of the first card is the one that a look at all codes gives
    sae, host = load_pair(str(place / "tokens"), device="cpu")
    best = {}
    latent = int(re.search(r"#(\d+)", cards[0])[1])
    for unit in unit_batches(expand(str(place / "train")), batch_size=30, **host.reading({"image"})):
        rows = host.read(unit.batch, [sae.sites["image"]])[0]
        z = sae.encode(rows.x, "image").gather(torch.tensor([latent]))[:, 0]
        best |= {k: z[rows.item == i].max().item() for i, k in enumerate(unit.batch.keys)}
    shown = re.findall(r'alt="\w+ (train-\d+)"', cards[0])
    assert shown == sorted(best, key=lambda k: -best[k])[:9]
    assert f"({best[shown[0]]:.3f})" in cards[0]
    rows = {(r["score"], r["control"]): r for r in read_card(out)["rows"] if r["features"] == "code"}
    assert {c for _, c in rows} == {"", "random"} and 1 / 3 <= rows["purity of top 9", ""]["value"] <= 1
    assert rows["share with 5 of one class", ""]["n"] == 64


def test_pooled_sites_and_sets_without_classes(place):
    _, html, cards = run(place, "pooled", gallery=2)
    assert len(cards) == 8 and "frame" not in html and "of tokens" not in html
    _, html, cards = run(place, "pooled", "bare", 2)
    assert "Strongest latents of the SAE" in html and " of 9 " not in html and len(cards) == 8


def test_latents_are_called_by_their_names(place, tmp_path):
    own = sae_fingerprint(SAE.from_pretrained(place / "pooled"))
    names = {j: LatentName("striped", "wpmi", z=4.0, auroc=0.9, by="tower") for j in range(63)}
    path = write_names(tmp_path / "names.json", names | {63: LatentName(None, note="AUROC 0.60 is below 0.81")}, own)
    _, _, cards = run(place, "pooled", gallery=64, names=str(path))
    real, random = ([c for c in cards[k * len(cards) // 2 :][: len(cards) // 2]] for k in (0, 1))
    text = "wpmi, AUROC 0.90, z 4.0, by tower"
    called = [c for c in real if "#63<" not in c and "#63 " not in c]
    assert called and all("striped" in c and text in c for c in called) and not any("striped" in c for c in random)
    assert all("AUROC 0.60 is below 0.81" in c for c in real if c not in called)
    beside = write_names(place / "evidence" / "names" / "names.json", names, own)
    try:
        assert text in run(place, "pooled", gallery=2)[1]
        write_names(beside, names, "f" * 32)
        out, html, _ = run(place, "pooled", gallery=2)
        assert text not in html and any("without names" in w for w in read_card(out)["warnings"])
        with pytest.raises(InputError, match="names latents of SAE ffffffffffff"):
            run(place, "pooled", gallery=2, names=str(beside))
        with pytest.raises(InputError, match="is for the page of --gallery"):
            run(place, "pooled", gallery=0, names=str(path))
    finally:
        shutil.rmtree(place / "evidence")


def test_a_page_of_an_earlier_run_is_replaced(place):
    out, *_ = run(place, "pooled", gallery=1)
    call(evaluate, str(place / "pooled"), str(place / "suite.yaml"), str(out), progress=False)
    assert {p.name for p in out.iterdir()} == {"report.html", "results.json", "tables.md"}


def test_the_frame_is_around_the_strongest_place():
    z = torch.zeros(16)
    z[6] = 2.0  # second row, third column of 4 x 4
    shown = lit(torch.ones(3, 64, 64), z, None)
    assert shown.size == (112, 112)
    yellow = [(x, y) for x in range(112) for y in range(112) if shown.getpixel((x, y)) == FRAME]
    assert (min(x for x, _ in yellow), max(x for x, _ in yellow)) == (54, 85)
    assert (min(y for _, y in yellow), max(y for _, y in yellow)) == (26, 57)
    assert shown.getpixel((70, 42))[0] > 240 and shown.getpixel((5, 100)) == (round(DARK * 255),) * 3
    corner = lit(torch.ones(3, 64, 64), torch.tensor([1.0, 0, 0, 0]), None)
    assert corner.getpixel((1, 30)) == corner.getpixel((30, 1)) == FRAME
    special = torch.tensor([True] + [False] * 16)
    under = lit(torch.ones(3, 64, 64), torch.cat([torch.tensor([3.0]), z]), special)  # the class token is strongest
    assert not [1 for v in under.getdata() if v == FRAME]
    assert torch.equal(lit(torch.ones(3, 64, 64), z[:1], None), torch.ones(3, 64, 64))


def test_grids():
    assert grid_of(16, 64, 64) == (4, 4) and grid_of(8, 32, 64) == (2, 4) and grid_of(7, 64, 64) is None
    assert grid_of(1, 64, 64) is None


def test_the_transform_is_taken_back(place):
    _, host = load_pair(str(place / "pooled"), device="cpu")
    transform = host.transform()
    image = Image.new("RGB", (32, 32), (200, 100, 50))
    shown = plain(transform(image)[None], transform)[0]
    assert torch.allclose(shown[:, 5, 5] * 255, torch.tensor([200.0, 100, 50]), atol=1)
    stretched = plain(torch.randn(2, 3, 4, 4), None)
    assert stretched.amin((1, 2, 3)).tolist() == [0, 0] and stretched.amax((1, 2, 3)).tolist() == [1, 1]


def test_bad_input(place, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--sae", str(place / "pooled"), "--suite", str(place / "suite.yaml"), "--out",
              str(place / "x"), "--gallery", "-1"])  # fmt: skip
    assert "--gallery is -1" in capsys.readouterr().err and not (place / "x").exists()
    with pytest.raises(InputError, match="host lvlm:x has no plain images"):
        check_host(SimpleNamespace(hint="lvlm:x", reading=lambda _: {"collate": print}))


def test_latents_that_hardly_fire_are_no_cards(place):
    write_colours(place / "few", 6, 2, "few")
    suite = yaml.safe_load((place / "suite.yaml").read_text()) | {"data": {"train": "few", "test": "test"}}
    (place / "few.yaml").write_text(yaml.safe_dump(suite))
    _, html, cards = run(place, "pooled", "few", 2)
    assert not cards and html.count("No latent fires on 9 images.") == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_card_and_the_page_of_the_cpu(place):
    suite = yaml.safe_load((place / "suite.yaml").read_text()) | {"heads": ["core", "top_images", "targeted"]}
    (place / "devices.yaml").write_text(yaml.safe_dump(suite))
    for sae in ("tokens", "pooled"):
        found = []
        for device in ("cpu", "cuda"):
            out = place / f"{sae}_{device}"
            call(
                evaluate,
                str(place / sae),
                str(place / "devices.yaml"),
                str(out),
                gallery=2,
                device=device,
                progress=False,
            )
            found.append(read_card(out)["rows"])
            assert (out / "gallery.html").read_text().count("data:image/") > 9
        for a, b in zip(*found, strict=True):
            assert all(a[k] == b[k] for k in ("set", "score", "features", "control", "n"))
            assert a["value"] == pytest.approx(b["value"], abs=0.02, nan_ok=True)
