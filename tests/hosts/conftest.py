"""Small hosts, made once."""

import pytest
import torch

from mmsae.hosts import load_host
from mmsae.types import ImageTextBatch
from tests.helpers.encoders import CAPTIONS, MODELS, save_local


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """``host(kind) -> OpenCLIPHost``, made once."""
    made, root = {}, tmp_path_factory.mktemp("hosts")

    def get(kind):
        if kind not in made:
            made[kind] = load_host(save_local(root / kind, MODELS[kind]))
        return made[kind]

    return get


@pytest.fixture()
def batch_for():
    """``batch_for(host) -> ImageTextBatch`` of four pairs."""

    def get(host):
        g = torch.Generator().manual_seed(0)
        images = torch.randn(4, *host.probe_input("image", 1).shape[1:], generator=g)
        ids = host.tokenize(CAPTIONS) if host.tokenize else None
        return ImageTextBatch(images, ids, list("wxyz"), CAPTIONS, list("0123"), ["s"] * 4)

    return get
