"""Extraction that leaves pixels, and on request resizing, to the host's device; batches that are still on the way."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmsae.activations import ActivationStore, extract
from mmsae.activations.extract import Coming
from mmsae.cli import main
from mmsae.hosts import load_host
from mmsae.shards import ShardWriter
from mmsae.types import InputError
from tests.helpers.encoders import MODELS, save_local
from tests.helpers.stores import FakeHost, contents, make_shards

QUIET = {"workers": 0, "progress": False}


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return save_local(tmp_path_factory.mktemp("host") / "vit", MODELS["vit"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two tars of pictures of three sizes."""
    import io

    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    with ShardWriter(folder, "data", per_shard=7) as w:
        for i in range(14):
            h, w_ = ((40, 52), (64, 64), (90, 33))[i % 3]
            y, x = np.mgrid[:h, :w_]
            waves = np.stack([np.sin((x + i) / 9), np.cos(y / 7), np.sin((x + y) / 11)], 2)
            pixels = (127 + 90 * waves + rng.normal(0, 8, waves.shape)).clip(0, 255).astype(np.uint8)
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "jpeg", quality=95)
            w.write(f"{i:06d}", {"jpg": out.getvalue(), "txt": f"a red circle {i}"})
    return sorted(map(str, folder.glob("*.tar")))


def test_a_store_has_the_bits_of_the_hosts_own_transform(name, photos, tmp_path, monkeypatch):
    host = load_host(name)
    made = extract(host, photos, tmp_path / "pixels", batch_size=4, workers=2, progress=False)
    monkeypatch.setitem(host.__dict__, "_split", None)  # floats travel, as they did before
    assert contents(made) == contents(extract(host, photos, tmp_path / "floats", batch_size=4, **QUIET))


def test_resizing_on_the_device_is_compared_recorded_and_another_job(name, photos, tmp_path, capsys):
    out = tmp_path / "device"
    args = ["extract", "--host", name, "--shards", *photos, "--batch-size", "4", "--workers", "0"]
    main([*args, "--out", str(out), "--resize", "device"])
    assert "beside the host's own transform: pixels within" in capsys.readouterr().out
    own = extract(name, photos, tmp_path / "own", batch_size=4, **QUIET)
    a, b = ActivationStore(out), ActivationStore(own)
    assert a.spec.job["resize"] == "device" and "resize" not in b.spec.job
    x, y = a.load(modality="image"), b.load(modality="image")
    assert not torch.equal(x, y) and torch.cosine_similarity(x, y).min() > 0.9999
    assert torch.equal(a.load(modality="text"), b.load(modality="text")) and a.uids == b.uids
    with pytest.raises(InputError, match="resize"):
        extract(name, photos, own, batch_size=4, resize="device", **QUIET)
    two = extract(name, photos, tmp_path / "two", batch_size=4, resize="device", workers=2, progress=False)
    assert contents(two) == contents(out)


def test_hosts_without_such_a_transform_are_refused(photos, tmp_path):
    with pytest.raises(InputError, match="needs embeddings of images"):
        extract(FakeHost(), photos, tmp_path / "s", resize="device", **QUIET)
    assert not (tmp_path / "s").exists()


def test_what_is_still_on_the_way_is_written_in_its_place(tmp_path, monkeypatch):
    """On a GPU a batch is written while the next is computed: the same bytes, faults and all."""
    shards = make_shards(tmp_path / "shards")
    want = extract(FakeHost(spoil="000007"), shards, tmp_path / "want", batch_size=4, fault_limit=1, **QUIET)
    waited = []

    class Event:
        def synchronize(self):
            waited.append(1)

    of = Coming.of
    monkeypatch.setattr(Coming, "of", lambda *a: of(*a)._replace(arrived=Event()))
    made = extract(FakeHost(spoil="000007"), shards, tmp_path / "made", batch_size=4, fault_limit=1, **QUIET)
    assert contents(made) == contents(want) and len(waited) == 9  # three tars of three batches
    faults = json.loads((made / "spec.json").read_text())["faults"]
    assert faults["counts"] == {"not_finite": 1}
