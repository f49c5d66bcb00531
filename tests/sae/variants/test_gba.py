"""GBA: the update rule's laws, what it does to frequencies, what it is refused with."""

import pytest
import torch
from torch.nn.functional import normalize

from mmsae import SAE, InputError
from mmsae.sae import (
    Dictionary,
    GroupBias,
    ReLU,
    ScaledDictionary,
    random_control,
)


def gba(d=8, d_sae=24, modalities=("image",), **options):
    torch.manual_seed(0)
    encoder = GroupBias(**{"groups": 3, "every": 1, **options})
    dictionaries = {"shared": ScaledDictionary()}
    sae = SAE(d, d_sae, modalities=modalities, encoder=encoder, selector=ReLU(), dictionaries=dictionaries)
    return sae.train()


def unit(n, d=8, seed=0):
    return normalize(
        torch.randn(n, d, generator=torch.Generator().manual_seed(1000 + seed))
    )  # not the atoms' own draws


def pre(sae, x, modality="image"):
    return sae._pre(x, modality)[0].dense().detach()


def test_the_forward_is_the_formula_and_the_bias_gets_no_gradient():
    sae = gba()
    x, d, e = unit(30), sae.dictionaries["shared"], sae.encoder
    with torch.no_grad():
        d.scale.uniform_(0.5, 2)
        d.bias.normal_(std=0.1)
        e.bias.uniform_(-0.5, 0)
    out = sae({"image": x})["image"]
    y = (x - d.bias) @ d.weight.T + e.bias[0]
    torch.testing.assert_close(out.codes.to_dense(), y.relu())
    torch.testing.assert_close(out.x_hat, y.relu() @ (d.scale[:, None] * d.weight) + d.bias)
    out.x_hat.sum().backward()
    assert not e.bias.requires_grad and d.scale.grad.any() and d.weight.grad.any() and d.bias.grad.any()
    e.response = "unbiased"
    torch.testing.assert_close(sae.encode(x).to_dense(), (y - e.bias[0]) * (y > 0))


def test_one_update_is_the_rule_by_hand():
    sae = gba(groups=2, highest=0.4, lowest=0.1, lower=0.1, lift=0.2, d_sae=4)
    e = sae.encoder  # groups 0, 0, 1, 1; targets .4 and .1
    e.bias.copy_(torch.tensor([[-0.3, -0.3, -0.3, -0.98]]))
    e._observe(0, torch.tensor([[0.5, -1, 0.5, 0.4], [0.2, -1, -1, 0.6], [0.1, -1, -1, -1], [-1, -1, -1, -1]]))
    e._observe(0, torch.full((6, 4), -1.0))
    e.after_step_()  # p = .3, 0, .1, .2; r = .5, 0, .5, .6; T = .5, .55
    torch.testing.assert_close(e.bias[0], torch.tensor([-0.3, -0.3 + 0.2 * 0.5, -0.3, -1.0]))
    assert not e.count.any() and not e.positives.any() and not e.largest.any()


def test_lowering_never_kills_never_raises_a_frequency_and_spares_what_is_within_its_target():
    sae, x = gba(d_sae=60, highest=0.3, lowest=0.02, lower=0.5), unit(4000)
    e = sae.encoder
    e.bias.uniform_(-0.9, 0)
    before, bias = pre(sae, x), e.bias.clone()
    e.after_step_()
    after = pre(sae.eval(), x)
    p, target = (before > 0).float().mean(0), e.target[e.group]
    over, within = p > target, (p >= e.silent) & (p <= target)
    assert over.sum() > 10 and within.sum() > 5
    top = before.argmax(0)
    assert (after[top, range(60)][over] > 0).all()
    assert ((after > 0).float().mean(0) <= p)[over].all() and (e.bias[0] < bias[0])[over].all()
    assert torch.equal(e.bias[0][within], bias[0][within])


def test_biases_stay_between_minus_1_and_0_and_minus_1_silences_unit_rows():
    sae = gba(lower=0.9, lift=0.9, highest=1e-3, lowest=1e-3)
    for i in range(60):
        pre(sae, unit(50, seed=i))
        sae.encoder.after_step_()
        assert (sae.encoder.bias >= -1).all() and (sae.encoder.bias <= 0).all()
    sae.encoder.bias.fill_(-1)
    assert not (pre(sae, unit(5000)) > 0).any()


def test_on_stationary_data_frequencies_settle_below_their_targets_and_are_ordered():
    """With the default rates and 3,000 windows of 1,000 new rows: .072, .0047 and .0010 for .1, .01 and .001."""
    sae, x = gba(d_sae=30, highest=0.1, lowest=1e-3, lower=0.05, lift=0.05), unit(2000)
    for _ in range(150):
        y = pre(sae, x)
        sae.encoder.after_step_()
    p = (y > 0).float().mean(0)
    medians = [float(p[sae.encoder.group == g].median()) for g in range(3)]
    assert medians[0] <= 0.1 and medians[1] <= 0.01 and medians[2] <= 1e-3 + 1e-9
    assert medians[0] > 3 * medians[1] > 9 * medians[2] > 0


def test_modalities_are_counted_by_themselves():
    for own in (False, True):
        sae = gba(modalities=("image", "text"), highest=0.2, lowest=0.2, per_modality=own)
        x = unit(1000)
        with torch.no_grad():
            sae({"image": x, "text": -x[:10]})
        for m, rows in (("image", x), ("text", -x[:10])):
            e, i = sae.encoder, sae.modalities.index(m)
            y = rows @ sae.dictionaries["shared"].weight.T
            assert e.count[i] == len(rows) and torch.equal(e.positives[i], (y > 0).sum(0))
            torch.testing.assert_close(e.largest[i], y.amax(0).relu())
        sae.encoder.after_step_()
        assert len(sae.encoder.bias) == 1 + own and (sae.encoder.bias < 0).any(1).all()
    # ten rows in a thousand would not move a pooled frequency above its target; by themselves they do
    sae = gba(modalities=("image", "text"), d_sae=3, highest=0.2, lowest=0.2)
    sae.encoder._observe(0, torch.full((990, 3), -1.0))
    sae.encoder._observe(1, torch.full((10, 3), 0.5))
    sae.encoder.after_step_()
    assert (sae.encoder.bias == -0.01 * 0.5).all()


def test_a_modality_that_a_window_did_not_see_is_not_silent():
    sae = gba(modalities=("image", "text"), per_modality=True)
    sae.encoder.bias.fill_(-0.5)
    sae.encoder._observe(0, torch.cat([torch.full((9, 24), -1.0), torch.full((1, 24), 0.001)]))
    sae.encoder.positives.zero_()
    sae.encoder.after_step_()
    assert (sae.encoder.bias[0] > -0.5).all() and (sae.encoder.bias[1] == -0.5).all()


def test_windows_end_every_so_many_steps_and_evaluation_counts_nothing():
    sae = gba(every=3, highest=1e-3, lowest=1e-3)
    moved = []
    for _ in range(7):
        pre(sae, unit(20))
        sae.encoder.after_step_()
        moved.append(bool((sae.encoder.bias < 0).any()))
    assert moved == [False, False, True, True, True, True, True] and sae.encoder.count.item() == 20
    pre(sae.eval(), unit(20))
    assert sae.encoder.count.item() == 20


def test_the_rank_by_rank_window_is_that_of_all(monkeypatch):
    """What the other rank counted is added, and of largest pre-codes the larger one is taken."""
    sae, other = gba(), pre(gba(), unit(40, seed=9))

    def all_reduce(t, op):
        if t.is_floating_point():
            assert op == torch.distributed.ReduceOp.MAX
            t.copy_(torch.maximum(t, other.amax(0)))
        else:
            assert op == torch.distributed.ReduceOp.SUM
            t += (other > 0).sum(0) if t.numel() == 24 else 40

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    both = torch.cat([pre(sae, unit(30)), other])
    e = sae.encoder
    assert e.count.item() == 70 and torch.equal(e.positives[0], (both > 0).sum(0))
    torch.testing.assert_close(e.largest[0], both.amax(0).relu())


def test_other_dictionaries_are_refused():
    scaled = {"shared": ScaledDictionary()}
    with pytest.raises(InputError, match="must be 'scaled' or of norm 'unit', not 'dictionary' of norm 'free'"):
        SAE(4, 8, encoder=GroupBias(2), selector=ReLU(), dictionaries={"shared": Dictionary("free")})
    with pytest.raises(InputError, match="'scaled' goes with encoder 'gba', and not with 'affine'"):
        SAE(4, 8, selector=ReLU(), dictionaries=scaled)


def test_the_random_control_has_untrained_biases_and_scales():
    sae = gba()
    sae.encoder.bias.fill_(-0.5)
    with torch.no_grad():
        sae.dictionaries["shared"].scale.fill_(3)
    fresh = random_control(sae)
    assert not fresh.encoder.bias.any() and (fresh.dictionaries["shared"].scale == 1).all()
