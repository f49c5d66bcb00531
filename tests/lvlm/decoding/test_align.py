from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmsae.activations import ActivationStore
from mmsae.activations.memory import write_store
from mmsae.cli import command_parser
from mmsae.lvlm.decoding.align import align
from mmsae.lvlm.decoding.concept import PRESETS, ConceptDecoder
from mmsae.sae import SAE, Dictionary, DistanceEncoder, TopK
from mmsae.sae.aligner import Aligner
from mmsae.types import InputError
from tests.helpers.lvlm_jobs import make_host

RECIPES = Path(__file__).parents[3] / "configs" / "eval"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return make_host(tmp_path_factory.mktemp("align"))


def test_an_aligned_store_trains_an_sae_that_knows_its_tap(host, tmp_path):
    torch.manual_seed(0)
    sites = {m: host.site(f"layers.2:in[{m}_mean]") for m in ("image", "text")}
    x = {m: torch.randn(6, host.hidden_size) for m in sites}
    write_store(tmp_path / "states", x, sites=sites, captions=list("abcdef"))
    aligner = Aligner(host.hidden_size, width=20)
    aligner.save_pretrained(tmp_path / "aligner")
    store = ActivationStore(align(str(tmp_path / "states"), str(tmp_path / "aligner"), str(tmp_path / "aligned")))
    torch.testing.assert_close(store.load(modality="text"), aligner.align(x["text"], "text").detach())
    assert store.captions == list("abcdef") and store.sites["image"].width == 20
    sae = SAE(20, 64, encoder=DistanceEncoder(), selector=TopK(8),
              dictionaries={m: Dictionary("free") for m in ("image", "text")}).eval()  # fmt: skip
    sae.sites = store.sites
    with pytest.raises(InputError, match="was trained on"):
        sae.attach(host)
    assert ConceptDecoder(host, sae, aligner).site.module.endswith("layers.2")
    with pytest.raises(InputError, match="allow_other_site=True"):
        ConceptDecoder(host, sae, aligner, site="layers.2:out")
    with pytest.raises(InputError, match="belongs to host"):
        ConceptDecoder(host, sae, Aligner(host.hidden_size, width=20))  # another aligner
    sae.sites = {m: replace(s, host="0" * 32) for m, s in store.sites.items()}
    with pytest.raises(InputError, match="belongs to host"):
        ConceptDecoder(host, sae, aligner)


def test_align_refuses(tmp_path):
    write_store(tmp_path / "states", {"image": torch.randn(4, 8), "text": torch.randn(4, 8)})
    write_store(tmp_path / "one", {"image": torch.randn(4, 8)})
    Aligner({"image": 8, "text": 6}).save_pretrained(tmp_path / "aligner")
    with pytest.raises(InputError, match="has text states of width 8, the aligner takes 6"):
        align(str(tmp_path / "states"), str(tmp_path / "aligner"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="holds image; aligning needs image and text"):
        align(str(tmp_path / "one"), str(tmp_path / "aligner"), str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["pope", "chair"])
def test_published_recipes_parse(name):
    parser, _ = command_parser(name)
    args = ["-c", str(RECIPES / f"{name}_vl_sae_llava.yaml"), "--shards", "s", "--out", "o"]
    values = parser.parse_args(args)
    assert tuple(values.settings if isinstance(values.settings, tuple) else vars(values.settings).values()) == tuple(
        PRESETS[name]
    )
    assert values.allow_other_site and values.seed == 55 and values.site == "layers.30:out"
