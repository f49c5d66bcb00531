"""An SAE with its host, loaded in one call."""

import pytest
import torch

from mmsae import SAE, InputError, load_pair
from mmsae.hosts import load_host
from mmsae.load import load_unchecked, named_pair, other_host_warnings
from tests.helpers.encoders import MODELS, save_local


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    name = save_local(root / "host", MODELS["vit"])
    host = load_host(name)
    width = host.width("image.embed")
    sae = SAE().build(width, 2 * width)
    sae.sites = host.default_sites()
    sae.save_pretrained(root / "sae")
    return root, name, host


def test_the_host_is_the_one_that_the_sites_name(place):
    root, name, host = place
    sae, found = load_pair(root / "sae", device="cpu")
    assert found.hint == name and found.fingerprint == host.fingerprint and sae.sites == host.default_sites()
    named, same = load_pair(str(root / "sae"), host)
    assert same is host and named.sites == sae.sites and other_host_warnings(named, host) == []


def test_another_host_is_refused_unless_allowed(place, tmp_path):
    other = load_host(save_local(tmp_path / "other", MODELS["vit"], 1))
    trained = SAE.from_pretrained(place[0] / "sae")
    with pytest.raises(InputError, match=r"not on host .*--allow-other-site"):
        load_pair(trained, other)
    sae, _ = load_pair(trained, other, allow_other_site=True)
    assert sae.sites == other.default_sites() and trained.sites == place[2].default_sites()
    (image, text) = other_host_warnings(trained, other)
    assert "image.embed" in image and "text.embed" in text and other.fingerprint[:12] in image
    assert torch.equal(next(sae.parameters()), next(trained.parameters()))


def test_the_parts_of_it(place, tmp_path):
    root, name, host = place
    assert named_pair(root / "sae")[1] == name and named_pair(root / "sae", "timm:x")[1] == "timm:x"
    other = load_host(save_local(tmp_path / "other", MODELS["vit"], 2))
    sae, same = load_unchecked(root / "sae", other)  # another host, which load_pair refuses
    assert same is other and sae.sites == host.default_sites()
    assert load_unchecked(root / "sae", device="cpu")[1].fingerprint == host.fingerprint


def test_it_says_which_sae_names_no_host(place, tmp_path):
    SAE().build(8, 64).save_pretrained(tmp_path / "sae")
    with pytest.raises(InputError, match=r"SAE .*sae does not say on which host it was trained; name it with --host"):
        load_pair(tmp_path / "sae")
    with pytest.raises(InputError, match="device is 'tpu'"):
        load_pair(place[0] / "sae", device="tpu")
