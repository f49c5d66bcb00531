"""Extract, fit, evaluate and ood on real pretrained weights and real photographs, as a package has them offline.

The host is EfficientNet-Lite0 of the extra ``lite0``; the images are crops of the two photographs (CC BY 2.0) that
scikit-learn brings, and squares on grey, which are out of distribution.
"""

import io
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mmsae.activations import ActivationStore, extract
from mmsae.cli import main
from mmsae.evaluation.card.card import read_card
from mmsae.evaluation.card.command import evaluate
from mmsae.evaluation.ood.command import ood
from mmsae.evaluation.rows import find
from mmsae.hosts.encoders import lite0
from mmsae.options import call
from mmsae.sae import SAE
from mmsae.shards import ShardWriter
from tests.helpers.doc_blocks import ROOT

pytestmark = pytest.mark.skipif(lite0.checkpoint() is None, reason=f"{lite0.PACKAGE} is not installed")
SITE, SIDE = "blocks.6:out[all]", 128


def crops(folder, n, seed):
    """A tar of n crops of each photograph, whose class is the photograph."""
    images = pytest.importorskip("sklearn.datasets").load_sample_images()
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, folder.name) as w:
        for i in range(2 * n):
            pixels = images.images[i % 2]
            y, x = (rng.integers(0, s - SIDE) for s in pixels.shape[:2])
            png = io.BytesIO()
            Image.fromarray(pixels[y : y + SIDE, x : x + SIDE]).save(png, "png")
            name = ("temple", "flower")[i % 2]
            w.write(f"{i:04d}", {"png": png.getvalue(), "json": {"class": name, "uid": f"{seed:016x}{i:016x}"}})
    return str(folder)


def scenes(folder, n):
    """A tar of squares on grey, which are no photographs."""
    with ShardWriter(folder, folder.name) as w:
        for i in range(n):
            pixels = np.full((SIDE, SIDE, 3), 128, np.uint8)
            pixels[20 + i : 60 + i, 30:80] = np.roll((220, 30, 30), i)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "png")
            w.write(f"{i:04d}", {"png": png.getvalue(), "json": {"uid": f"{7:016x}{i:016x}"}})
    return str(folder)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """The folder of everything, and the SAE."""
    root = tmp_path_factory.mktemp("real")
    train, val, test = (crops(root / name, n, seed) for seed, (name, n) in
                        enumerate((("train", 24), ("val", 8), ("test", 12))))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMSAE_CACHE", str(root / "cache"))
        extract("lite0", train, root / "store", sites=[SITE], workers=0, batch_size=16, progress=False)
        at = "--model.sae.init_args."
        main(["fit", "-c", str(ROOT / "configs/train/topk_store.yaml"), "--data.store", str(root / "store"),
              "--data.batch_size", "256", f"{at}ratio", "null", f"{at}d_sae", "160", f"{at}selector.init_args.k", "8",
              "--trainer.max_steps", "150", "--trainer.val_check_interval", "150", "--seed_everything", "0",
              "--trainer.check_val_every_n_epoch", "null", "--trainer.enable_progress_bar", "false",
              "--trainer.default_root_dir", str(root / "run")])  # fmt: skip
        sae, shared = str(root / "run" / "sae"), {"cache": str(root / "kept"), "batch_size": 16, "progress": False}
        suite = {"root": str(root), "label": "class", "judge": "json:class",
                 "data": {name: name for name in ("train", "val", "test")},
                 "heads": {"core": {}, "monosemantic": {}, "localised": {"images": 5}}}  # fmt: skip
        (root / "suite.yaml").write_text(yaml.safe_dump(suite))
        call(evaluate, sae, str(root / "suite.yaml"), str(root / "card"), **shared)
        call(ood, sae, test, [f"scenes={scenes(root / 'scenes', 24)}"], str(root / "ood"), train=train, val=val,
             label="class", scores=("recon", "knn", "mds"), **shared)  # fmt: skip
    return root, SAE.from_pretrained(sae)


def test_the_store_and_the_sae_say_whose_activations_they_are_of(flow):
    root, sae = flow
    store = ActivationStore(root / "store")
    assert store.spec.rows["image"] == 48 * 49  # 7 x 7 places
    assert sae.sites["image"].hint == "lite0" and sae.sites["image"].module == "blocks.6"
    assert sae.sites["image"].host == store.spec.sites["image"].host
    mean = store.load(modality="image").float().mean(0)
    assert torch.nn.functional.cosine_similarity(sae.dictionary("image").bias, mean, dim=0) > 0.9


def test_it_is_better_than_random_weights_on_crops_that_it_has_not_seen(flow):
    rows = read_card(flow[0] / "card")["rows"]

    def value(score, features, control=""):
        return find(rows, score=score, features=features, control=control, set="test")[0]["value"]

    assert value("fvu", "recon") < 0.7 * value("fvu", "recon", "random")
    assert value("MS above chance", "code") > value("MS above chance", "code", "random")
    assert value("Moran's I", "code") > value("Moran's I", "code", "shuffled") + 0.1
    assert value("dead share", "code") < 0.5


def test_what_is_no_photograph_is_told_apart(flow):
    results = json.loads((flow[0] / "ood" / "results.json").read_text())
    assert results["images"]["id"] == results["images"]["scenes"] == 24 and results["images"]["train"] == 48
    (r,) = find(results["rows"], score="recon", set="scenes", features="codes", control="")
    assert r["auroc"] > 0.9
