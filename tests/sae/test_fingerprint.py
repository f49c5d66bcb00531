"""One fingerprint: of parts, sizes and tensors, whatever names the sites and whoever trained."""

import json

import pytest
import torch

from mmsae import SAE, Site
from mmsae.fingerprint import fingerprint
from mmsae.sae import Normaliser, TopK
from mmsae.sae.fingerprint import is_of, sae_fingerprint


def make(seed=0, k=3):
    torch.manual_seed(seed)
    sae = SAE(8, 32, normaliser=Normaliser(centre=True), selector=TopK(k))
    sae.fit_normaliser({m: torch.randn(20, 8) for m in sae.modalities})
    return sae


def test_sites_version_and_training_do_not_count_and_all_else_does(tmp_path):
    sae = make()
    own = sae_fingerprint(sae)
    sae.sites = {m: Site("0" * 32, f"{m}.embed", modality=m, width=8) for m in sae.modalities}
    again = SAE.from_pretrained(sae.save_pretrained(tmp_path / "sae", {"steps": 5}))
    assert own == sae_fingerprint(sae) == sae_fingerprint(again) == sae_fingerprint(make())
    changed = make()
    changed.normaliser.mean("image")[3] += 1e-6
    assert len({own, sae_fingerprint(make(1)), sae_fingerprint(make(k=4)), sae_fingerprint(changed)}) == 4


def test_what_earlier_versions_wrote_is_recognised(tmp_path):
    sae = make()
    sae.sites = {m: Site("0" * 32, f"{m}.embed", modality=m, width=8) for m in sae.modalities}
    block = json.loads((sae.save_pretrained(tmp_path / "sae") / "cfg.json").read_text())["mmsae"]
    del block["precision"]  # which they did not have

    def earlier(*without):
        return fingerprint({k: v for k, v in block.items() if k not in without} | {"format": 1}, sae.state_dict())

    with_sites = earlier("version", "training")
    assert sae_fingerprint(sae) == earlier("version", "training", "sites")  # filters' files go on as they are
    bare = {k: block[k] for k in ("d_in", "d_sae", "normaliser", "encoder", "selector", "dictionaries")}
    for found in (sae_fingerprint(sae), with_sites, fingerprint(bare, sae.state_dict())):
        assert is_of(sae, found) and not is_of(make(1), found)
    sae.sites = {}
    assert not is_of(sae, with_sites)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_precision_has_one(dtype):
    assert len(sae_fingerprint(make().to(dtype))) == 32
