import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import GroupMax


def test_one_latent_of_each_group_is_kept_by_the_naive_formula():
    torch.manual_seed(0)
    sae, x = SAE(6, 24, modalities=("image",), selector=GroupMax(4)).eval(), torch.randn(32, 6)
    u = ((x - sae.dictionary("image").bias) @ sae.encoder.weight.t() + sae.encoder.bias).relu()
    want = torch.zeros_like(u)
    for i, row in enumerate(u.detach()):
        for group in range(4):
            best = group * 6 + int(row[group * 6 : group * 6 + 6].argmax())
            want[i, best] = row[best]
    torch.testing.assert_close(sae.encode(x).to_dense(), want)
    assert int(sae.encode(x).l0().max()) == 4


def test_one_group_is_top_1_and_groups_of_one_are_relu():
    from mmsae.sae import ReLU, TopK

    torch.manual_seed(0)
    x = torch.randn(20, 6)
    for one, other in ((GroupMax(1), TopK(1)), (GroupMax(24), ReLU())):
        pair = [SAE(6, 24, modalities=("image",), selector=s) for s in (one, other)]
        pair[1].encoder.load_state_dict(pair[0].encoder.state_dict())
        torch.testing.assert_close(pair[0].encode(x).to_dense(), pair[1].encode(x).to_dense())


def test_gradients_reach_what_was_kept_and_nothing_else():
    sae = SAE(6, 24, modalities=("image",), selector=GroupMax(4))
    out = sae({"image": torch.randn(5, 6)})["image"]
    out.codes.to_dense().sum().backward()
    used = (out.codes.to_dense() != 0).any(0)
    assert torch.equal(sae.encoder.bias.grad != 0, used) and not used.all()


def test_groups_of_unequal_size_are_refused_with_the_numbers():
    with pytest.raises(InputError, match="k = 5 does not divide d_sae = 24"):
        SAE(6, 24, selector=GroupMax(5))
    with pytest.raises(InputError, match="at least 1, not 0"):
        GroupMax(0)
