import json

import pytest
import torch

from mmsae import InputError
from mmsae.interop import load
from mmsae.interop.dictionary_learning import write
from mmsae.sae import Normaliser
from tests.helpers.foreign import assert_equal_codes, rows, some_sae

KINDS = ("relu", "topk", "jumprelu", "gated", "batch_topk")


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_with_its_normaliser_folded(kind, subtract, tmp_path):
    sae = some_sae(kind, subtract, normaliser=Normaliser(centre=True, scale="rms"))
    again = load(write(sae, tmp_path / "sae"))
    codes = again.encode(rows())
    assert_equal_codes(sae, codes.to_dense(), again.decode(codes))


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_dictionary_learning_loads_it(kind, subtract, tmp_path):
    utils = pytest.importorskip("dictionary_learning.utils")
    sae = some_sae(kind, subtract)
    theirs, _ = utils.load_dictionary(str(write(sae, tmp_path / "sae")), "cpu")
    with torch.no_grad():
        codes = theirs.encode(rows())
        assert_equal_codes(sae, codes, theirs.decode(codes))


def folder_of(tmp_path, state, **trainer):
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    return tmp_path


def linear(d=6, h=18):
    g = torch.Generator().manual_seed(0)
    names = {"encoder.weight": (h, d), "encoder.bias": (h,), "decoder.weight": (d, h)}
    return {n: torch.randn(*shape, generator=g) for n, shape in names.items()}


def test_an_autoencoder_has_unit_atoms_when_it_is_loaded(tmp_path):
    s = linear() | {"bias": torch.randn(6)}
    sae, x = load(folder_of(tmp_path, s, dict_class="AutoEncoder")), torch.randn(9, 6)
    norms = s["decoder.weight"].norm(dim=0)
    codes = ((x - s["bias"]) @ s["encoder.weight"].t() + s["encoder.bias"]).relu()
    torch.testing.assert_close(sae.encode(x).to_dense(), codes * norms, atol=1e-5, rtol=1e-5)
    x_hat = codes @ s["decoder.weight"].t() + s["bias"]
    torch.testing.assert_close(sae.decode(sae.encode(x)), x_hat, atol=1e-4, rtol=1e-5)
    utils = pytest.importorskip("dictionary_learning.utils")
    theirs = utils.load_dictionary(str(tmp_path), "cpu")[0]
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).to_dense(), atol=1e-5, rtol=1e-5)


def test_matryoshka_is_read_by_its_threshold(tmp_path):
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (6, 18), "b_enc": (18,), "W_dec": (18, 6), "b_dec": (6,)}
    s = {n: torch.randn(*shape, generator=g) for n, shape in shapes.items()}
    s |= {"k": torch.tensor(3), "threshold": torch.tensor(0.8), "group_sizes": torch.tensor([6, 12])}
    sae, x = load(folder_of(tmp_path, s, dict_class="MatryoshkaBatchTopKSAE", k=3)), torch.randn(9, 6)
    u = ((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"]).relu()
    torch.testing.assert_close(sae.encode(x).to_dense(), u * (u > 0.8), atol=1e-5, rtol=1e-5)


def test_what_is_not_understood_is_refused_by_name(tmp_path):
    s = linear() | {"b_dec": torch.zeros(6), "k": torch.tensor(3), "threshold": torch.tensor(-1.0)}
    with pytest.raises(InputError, match="threshold -1, which stands for none"):
        load(folder_of(tmp_path, s, dict_class="BatchTopKSAE"))
    with pytest.raises(InputError, match="dict_class 'CrossCoder'; mmsae reads 'AutoEncoder'"):
        load(folder_of(tmp_path, s, dict_class="CrossCoder"))
    with pytest.raises(InputError, match=r"does not know: \['extra'\]"):
        load(folder_of(tmp_path, s | {"extra": torch.zeros(1)}, dict_class="AutoEncoderTopK"))
    with pytest.raises(InputError, match="no tensor 'k'"):
        load(folder_of(tmp_path, {n: t for n, t in s.items() if n != "k"}, dict_class="AutoEncoderTopK"))
    with pytest.raises(InputError, match="cannot be read as a file of tensors"):
        load(folder_of(tmp_path, {"encoder.weight": pytest.raises}, dict_class="AutoEncoder"))


def test_what_dictionary_learning_has_no_class_for_is_refused(tmp_path):
    with pytest.raises(InputError, match="dictionary_learning has no abstopk SAE; mmsae writes relu, topk"):
        write(some_sae("abstopk"), tmp_path / "out")
    with pytest.raises(InputError, match="takes rows as they are; the rows of this SAE are standardised"):
        write(some_sae("topk", normaliser=Normaliser(standardise=True)), tmp_path / "out")
