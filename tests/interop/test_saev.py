import json

import pytest
import torch

from mmsae import InputError
from mmsae.interop import load
from mmsae.interop.saev import write
from mmsae.sae import Normaliser
from tests.helpers.foreign import D, assert_equal_codes, rows, some_sae


@pytest.mark.parametrize("subtract", [True, False])
def test_what_is_written_is_read_back_with_its_normaliser_folded(subtract, tmp_path):
    sae = some_sae("relu", subtract, normaliser=Normaliser(centre=True, scale="rms"))
    folder = write(sae, tmp_path / "sae")
    for place in (folder, folder / "sae.pt"):
        again = load(place)
        codes = again.encode(rows())
        assert_equal_codes(sae, codes.to_dense(), again.decode(codes))


def test_saev_loads_it(tmp_path):
    theirs = pytest.importorskip("saev.nn").load(str(write(some_sae("relu"), tmp_path / "sae") / "sae.pt"))
    x_hat, codes, _ = theirs(rows())
    assert_equal_codes(some_sae("relu"), codes, x_hat)


def test_a_schema_that_two_ways_of_encoding_share_is_refused(tmp_path):
    file = write(some_sae("relu"), tmp_path / "sae") / "sae.pt"
    tensors = file.read_bytes().split(b"\n", 1)[1]
    cfg = {"d_vit": D, "exp_factor": 4, "activation": {"cls": "Relu", "params": {}}}
    file.write_bytes(json.dumps({"schema": 2, "cfg": cfg}).encode() + b"\n" + tensors)
    with pytest.raises(InputError, match="schema 2: development versions of saev"):
        load(file)


def test_bad_files_are_refused(tmp_path):
    file = write(some_sae("relu"), tmp_path / "sae") / "sae.pt"
    first, tensors = file.read_bytes().split(b"\n", 1)
    file.write_bytes(b'{"d_vit": 12}\n' + tensors)
    with pytest.raises(InputError, match="does not say exp_factor"):
        load(file)
    with open(file, "wb") as f:
        f.write(first + b"\n")
        torch.save({"W_enc": pytest.raises}, f)
    with pytest.raises(InputError, match="cannot be read as a file of tensors"):
        load(file)


def test_what_saev_has_not_is_refused(tmp_path):
    with pytest.raises(InputError, match="saev has no topk SAE"):
        write(some_sae("topk"), tmp_path / "out")
    with pytest.raises(InputError, match="whole number of latents per input feature, not 30 of width 12"):
        write(some_sae("relu", d_sae=30), tmp_path / "out")
