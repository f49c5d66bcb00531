"""The model card: metadata that the hub reads, what is known of the SAE, and code that runs."""

import json

import pytest
import torch
from huggingface_hub import ModelCard

from mmsae import SAE, Site
from mmsae.sae import TopK
from mmsae.sae.card import PLACE, is_own, model_card


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    sae = SAE(8, 32, selector=TopK(3))
    sae.sites = {
        m: Site("ab" * 16, f"{m}.embed", modality=m, width=8, hint="hf-hub:laion/CLIP-x") for m in ("image", "text")
    }
    return sae.save_pretrained(tmp_path / "sae", {"steps": 800, "tokens": {"image": 4096}, "validation": {"fvu": 0.25}})


def card(folder, **options):
    return model_card(json.loads((folder / "cfg.json").read_text()), **options)


def test_metadata_is_what_the_hub_takes(folder):
    data = ModelCard(card(folder, licence="apache-2.0")).data
    assert data.license == "apache-2.0" and data.library_name == "mmsae"
    assert data.tags == ["sparse-autoencoder", "interpretability", "image", "text"]
    assert data.base_model == ["laion/CLIP-x"]
    plain = ModelCard(card(folder)).data.to_dict()
    assert "license" not in plain
    odd = ModelCard(card(folder, licence="a: b # c")).data
    assert odd.license == "a: b # c"


def test_host_site_parts_and_training_are_named(folder):
    text = card(folder)
    assert f"| image | `image.embed` | out | pooled | 8 | `hf-hub:laion/CLIP-x` | `{'ab' * 16}` |" in text
    assert '- selector: `{"name": "topk", "k": 3, "strict": false}`' in text
    assert "- steps: 800\n- tokens: image 4096\n- validation: fvu 0.25\n" in text
    assert "No evaluation was given with this SAE" in text and "None is named" in text


def test_the_code_of_a_card_runs(folder):
    code = card(folder, place=str(folder)).split("```python\n")[1].split("```")[0]
    names = {"x": torch.randn(5, 8)}
    exec(code, names)
    assert names["codes"].values.shape == (5, 3) and len(code.splitlines()) == 3
    assert torch.equal(names["codes"].values, SAE.from_pretrained(folder).encode(names["x"], "image").values)


def test_what_somebody_wrote_is_known(folder):
    assert is_own((folder / "README.md").read_text()) and is_own(f'SAE.from_pretrained("{PLACE}")')
    assert not is_own("# Mine")
