import pytest
import torch

from mmsae import SAE, InputError
from mmsae.interop import load
from mmsae.interop.overcomplete import write
from mmsae.sae import Dictionary
from tests.helpers.foreign import D, F, assert_equal_codes, rows, some_sae


def unit(kind):
    """An SAE of a kind without a bias in decoding and with atoms of norm 1."""
    sae = some_sae(kind, bias=False)
    weight = sae.dictionaries["shared"].weight
    weight.copy_(weight / weight.norm(dim=1, keepdim=True))
    return sae


@pytest.mark.parametrize(("kind", "hints"), [("topk", {"k": 5}), ("pursuit_max", {"k": 5}), ("jumprelu", {})])
def test_what_is_written_is_read_back(kind, hints, tmp_path):
    sae = unit(kind)
    again = load(write(sae, tmp_path / "sae"), **hints)
    codes = again.encode(rows())
    assert_equal_codes(sae, codes.to_dense(), again.decode(codes))


@pytest.mark.parametrize(
    ("kind", "name", "hints"), [("topk", "TopKSAE", {"top_k": 5}), ("pursuit_max", "MpSAE", {"k": 5}),
                                ("jumprelu", "JumpSAE", {})]
)  # fmt: skip
def test_overcomplete_takes_the_state_dict(kind, name, hints, tmp_path):
    theirs = getattr(pytest.importorskip("overcomplete.sae"), name)(D, F, **hints)
    sae = unit(kind)
    theirs.load_state_dict(torch.load(write(sae, tmp_path / "sae") / "state_dict.pt", weights_only=True))
    theirs.eval()
    with torch.no_grad():
        _, codes, x_hat = theirs(rows())
    assert_equal_codes(sae, codes, x_hat)


def test_a_batch_topk_takes_its_threshold(tmp_path):
    sae = unit("topk")
    folder = write(sae, tmp_path / "sae")
    u = (rows() @ sae.encoder.weight.t() + sae.encoder.bias).relu()
    theta = float(u.flatten().topk(100).values[-1])  # the entry that is equal to it counts
    codes = u * (u >= theta)
    found = load(folder, threshold=theta)
    assert int((codes != 0).sum()) == 100
    assert_equal_codes(found, codes, codes @ sae.dictionaries["shared"].weight)


def test_what_the_file_does_not_say_is_not_guessed(tmp_path):
    folder = write(unit("topk"), tmp_path / "sae")
    for hints in ({}, {"k": 5, "threshold": 0.1}):
        with pytest.raises(InputError, match="give k, or the threshold of a BatchTopKSAE"):
            load(folder, **hints)
    state = torch.load(folder / "state_dict.pt")
    torch.save(state | {"Q": torch.zeros(1)}, folder / "state_dict.pt")
    with pytest.raises(InputError, match=r"does not know: \['Q'\]"):
        load(folder, k=5)
    with pytest.raises(InputError, match="which has thresholds: give neither k nor threshold"):
        load(write(unit("jumprelu"), tmp_path / "jump"), k=5)


def test_what_overcomplete_cannot_hold_is_refused(tmp_path):
    biased = SAE(D, F, modalities=("image",), dictionaries={"shared": Dictionary()})
    biased.dictionaries["shared"].bias.data.fill_(0.1)
    for sae, why in (
        (biased, "decoders have no bias"),
        (some_sae("topk", bias=False), "atoms have norm 1"),
        (unit("relu"), "overcomplete has no relu SAE"),
        (unit("pursuit"), "sign 'max' and no stop, not sign 'relu'"),
    ):
        with pytest.raises(InputError, match=why):
            write(sae, tmp_path / "out")
