"""Logits of the host's own classifier: `mmsae ood --logits`."""

import json

import numpy as np
import pytest
import timm
import torch

from mmsae import load_pair
from mmsae.evaluation.ood.classifiers import whose_logits
from mmsae.evaluation.ood.command import ood
from mmsae.evaluation.ood.head import ID
from mmsae.evaluation.rows import find
from mmsae.hosts import load_host
from mmsae.options import call
from mmsae.shards import expand, unit_batches
from mmsae.types import InputError
from tests.helpers.evaluation import save_host, save_sae, write_colours, write_noise


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny classifier of 10 classes that has never heard of the ID set's three."""
    folder = tmp_path_factory.mktemp("own")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=10)
    (folder / "host").mkdir()
    timm.models.save_for_hf(model, folder / "host", safe_serialization="both")
    host = f"timm:local-dir:{folder / 'host'}"
    return {
        "host": host,
        "sae": save_sae(folder / "sae", host),
        "tokens": save_sae(folder / "tokens", host, "blocks.2:out[patches]"),
        "id": write_colours(folder / "id", 90, 0),
        "noise": write_noise(folder / "noise", 20),
    }


def run(place, out, **more):
    few = {"scores": ["msp", "energy", "vim", "react", "support"], "controls": ["random", "pca"]}
    args = {"sae": place["sae"], "id": place["id"], "ood": [f"noise={place['noise']}"], "progress": False, **few}
    call(ood, **{**args, "out": str(out), **more})
    with np.load(out / "scores.npz", allow_pickle=False) as saved:
        return json.loads((out / "results.json").read_text()), dict(saved)


def logits_by_hand(place, through=lambda x: x):
    """Softmax of ``model(x)`` of the noise images, in the order of their shards."""
    host = load_host(place["host"])
    out = []
    for unit in unit_batches(expand(place["noise"]), batch_size=8, workers=0, **host.reading({"image"})):
        images = host.prepared(unit.batch).images
        pooled = host.model.forward_head(host.model.forward_features(images), pre_logits=True)
        new = through(pooled)
        out.append(host.model(images) if new is pooled else host.model.get_classifier()(new))
    return torch.cat(out)


def test_the_default_is_the_hosts_own_classifier(place, tmp_path):
    found, conf = run(place, tmp_path / "run")
    own = "the host's own, 10 classes"
    assert found["logits"] == {"raw": own, "recon": own, "code": "linear probe", "resid": "linear probe"}
    with torch.no_grad():
        want = logits_by_hand(place)
        np.testing.assert_allclose(conf["|raw|msp|noise"], want.softmax(1).amax(1), rtol=1e-4)
        np.testing.assert_allclose(conf["|raw|energy|noise"], want.logsumexp(1), rtol=1e-4)
        sae, _ = load_pair(place["sae"], device="cpu")
        want = logits_by_hand(place, lambda x: sae.decode(sae.encode(x, "image"), "image"))
        np.testing.assert_allclose(conf["|recon|msp|noise"], want.softmax(1).amax(1), rtol=1e-4)
    for control in ("random", "pca"):
        assert find(found["rows"], score="msp", features="recon", control=control, set="noise")
    whose = {r["features"] for r in found["rows"] if r["score"] == "id_accuracy" and not r["control"]}
    assert whose == {"code", "resid"}, "the host's classes are not the ID set's: it has no accuracy on them"


def test_the_hosts_logits_need_no_labels(place, tmp_path):
    found, conf = run(place, tmp_path / "run", label="", controls=[])
    assert "|raw|msp|noise" in conf and "|recon|vim|noise" in conf and "|code|msp|noise" not in conf
    assert any("1 class" in n and "but on raw, recon" in n for n in found["notes"])


def test_elsewhere_the_classifier_reads_the_embeddings(place, tmp_path):
    found, conf = run(place, tmp_path / "run", sae=place["tokens"], controls=[])
    assert found["logits"]["embed"] == "the host's own, 10 classes" and found["logits"]["raw"] == "linear probe"
    np.testing.assert_allclose(conf["|embed|msp|noise"], logits_by_hand(place).softmax(1).amax(1), rtol=1e-4)


def test_a_probe_on_request(place, tmp_path):
    found, _ = run(place, tmp_path / "run", logits="probe", controls=[])
    assert set(found["logits"].values()) == {"linear probe"}
    assert find(found["rows"], set=ID, score="id_accuracy", features="raw")


@pytest.mark.parametrize(
    ("logits", "message"),
    [("zeroshot", "needs the names of labelled classes"), ("energy", "logits is 'energy', it can be auto")],
)
def test_what_is_not_to_be_had_is_refused_before_the_host_is_opened(place, tmp_path, monkeypatch, logits, message):
    monkeypatch.setattr("mmsae.load.load_pair", lambda *a: pytest.fail("the host was opened"))
    with pytest.raises(InputError, match=message):
        run(place, tmp_path / "run", logits=logits)
    assert not (tmp_path / "run").exists()


def test_a_host_without_classifier(tmp_path):
    host = load_host(save_host(tmp_path / "host"))
    with pytest.raises(InputError, match="no linear classifier of its own"):
        whose_logits("host", host, names=True)
    assert whose_logits("auto", host, names=True) == "zeroshot" and whose_logits("auto", host, names=False) == "probe"
