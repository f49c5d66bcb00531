"""A folder of a web server or of an object store as one of this machine."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.remote.folders import brought_folder
from mmsae.sae import TopK
from mmsae.sae.fingerprint import sae_fingerprint


def test_all_or_nothing_and_anew_where_something_changed(server, tmp_path):
    server.files |= {"/x/a.json": b"1", "/x/b.bin": b"two"}
    first = brought_folder(f"{server.url}/x/", ["a.json", "b.bin"], ["c.txt"])
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {"a.json": b"1", "b.bin": b"two"}
    sent = server.sent.total()
    assert brought_folder(f"{server.url}/x", ["a.json", "b.bin"]) == first and server.sent.total() == sent
    server.files["/x/c.txt"] = b"three"
    assert len(list(brought_folder(f"{server.url}/x", ["a.json", "b.bin"], ["c.txt"]).iterdir())) == 3
    server.files["/x/a.json"] = b"other"
    assert (brought_folder(f"{server.url}/x", ["a.json", "b.bin"]) / "a.json").read_bytes() == b"other"
    with pytest.raises(InputError, match=r"/x/d\.bin cannot be read: the server answers 404"):
        brought_folder(f"{server.url}/x", ["a.json", "d.bin"])
    server.faults["/x/b.bin"] = ["cut"] * 20
    server.files["/x/b.bin"] = b"another thing"
    before = sorted(first.parent.iterdir())
    with pytest.raises(InputError, match="the transfer was cut"):
        brought_folder(f"{server.url}/x", ["a.json", "b.bin"])
    assert [p for p in sorted(first.parent.iterdir()) if p.is_dir()] == [p for p in before if p.is_dir()]


def saved(tmp_path):
    torch.manual_seed(0)
    sae = SAE(8, 32, modalities=["image"], selector=TopK(3))
    sae.save_pretrained(tmp_path / "sae")
    return sae, {p.name: p.read_bytes() for p in (tmp_path / "sae").iterdir()}


def test_an_sae_of_a_web_server(server, tmp_path):
    sae, files = saved(tmp_path)
    server.files |= {f"/saes/one/{name}": data for name, data in files.items()}
    for again in (
        SAE.from_pretrained(f"{server.url}/saes/one"),
        SAE.from_pretrained(f"{server.url}/saes", subfolder="one"),
    ):
        assert sae_fingerprint(again) == sae_fingerprint(sae)
    with pytest.raises(InputError, match=r"two/cfg\.json cannot be read: the server answers 404"):
        SAE.from_pretrained(f"{server.url}/saes/two")
