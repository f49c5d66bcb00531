import json

import pytest
import torch
from safetensors.torch import save_file

from mmsae import InputError
from mmsae.interop import load
from mmsae.interop.visaebench import write
from mmsae.sae import Normaliser
from tests.helpers.foreign import assert_equal_codes, rows, some_sae


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "batch_topk"])
def test_what_is_written_is_read_back_with_its_normaliser_folded(kind, tmp_path):
    sae = some_sae(kind, normaliser=Normaliser(centre=True, scale="rms"))
    again = load(write(sae, tmp_path / "sae"))
    codes = again.encode(rows())
    assert_equal_codes(sae, codes.to_dense(), again.decode(codes))


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "batch_topk"])
def test_visaebench_loads_it(kind, tmp_path):
    loader = pytest.importorskip("visaebench.hub.loader")
    sae = some_sae(kind)
    codes, x_hat = loader.load_sae(str(write(sae, tmp_path / "sae")), device="cpu")(rows())
    assert_equal_codes(sae, codes, x_hat)


def edited(folder, **fields):
    cfg = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


def test_a_missing_threshold_is_refused_and_one_that_is_there_counts_entries_equal_to_it(tmp_path):
    sae = some_sae("topk")
    folder = edited(write(sae, tmp_path / "sae"), activation="batchtopk")
    with pytest.raises(InputError, match=r"does not say threshold, nor has sae\.pt a _running_threshold"):
        load(folder)
    t = torch.load(folder / "sae.pt")
    u = (rows() @ t["encoder.weight"].t() + t["encoder.bias"]).relu()
    theta = float(u.flatten().topk(80).values[-1])
    codes = u * (u >= theta)
    assert_equal_codes(load(edited(folder, threshold=theta)), codes, codes @ t["decoder.weight"] + t["decoder.bias"])


def test_safetensors_and_yaml_are_read_too(tmp_path):
    folder = write(some_sae("topk"), tmp_path / "sae")
    save_file(torch.load(folder / "sae.pt"), folder / "model.safetensors")
    (folder / "config.yaml").write_text("sae_type: topk\nk: 5\n")
    (folder / "sae.pt").unlink()
    (folder / "config.json").unlink()
    again = load(folder)
    codes = again.encode(rows())
    assert_equal_codes(some_sae("topk"), codes.to_dense(), again.decode(codes))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"activation": "matryoshka"}, "has activation 'matryoshka'; mmsae reads 'topk' or 'batchtopk'"),
        ({"hidden_dim": 9}, "says hidden_dim 9, the weights have 48"),
        ({"activation": "jumprelu"}, "has no tensor 'thresholds'"),
        ({"k": None}, "does not say k"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change, why, tmp_path):
    with pytest.raises(InputError, match=why):
        load(edited(write(some_sae("topk"), tmp_path / "sae"), **change))


def test_what_visaebench_has_not_is_refused(tmp_path):
    with pytest.raises(InputError, match="visaebench has no gated SAE"):
        write(some_sae("gated"), tmp_path / "out")
