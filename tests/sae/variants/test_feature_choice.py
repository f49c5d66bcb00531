"""Feature Choice: quotas, whose columns they fill, thresholds after training; AuxZipf."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import AuxZipf, FeatureChoice, LossContext, PreCodes, SelectContext, TopK
from mmsae.sae.dictionary import Dictionary
from mmsae.sae.variants.feature_choice import capped_zipf, quotas
from mmsae.types import Codes, SAEOutput


def pre_of(u):
    return PreCodes(u, torch.eye(u.shape[1]), None)


def chosen(selector, u, modality="image"):
    values, indices = selector(pre_of(u), SelectContext(modality, Dictionary(), u))
    return torch.zeros_like(u).scatter(1, indices, values)


def built(k, d_sae, modalities=("image",), **options):
    selector = FeatureChoice(k, **options)
    selector.build(d_sae, modalities)
    return selector.train()


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("n", "total", "most"), [(64, 512, 512), (64, 64, 3), (50, 777, 20), (7, 35, 5), (9, 44, 5)])
def test_quotas_sum_to_the_budget_and_stay_within_their_bounds(n, total, most, exponent):
    m = quotas(n, total, most, exponent, 1.0)
    assert m.sum() == total and m.min() >= 1 and m.max() <= most
    assert (m.diff() <= 1).all()  # by rank, but for the rounding
    if exponent == 0:
        assert m.max() - m.min() <= 1


def test_what_a_cap_takes_goes_to_the_others_in_the_same_proportion():
    share = capped_zipf(100, 30.0, 1.0, 1.0, 1.0)
    capped = int((share == 1).sum())
    assert 0 < capped < 30 and share.sum().item() == pytest.approx(30)
    rank = torch.arange(capped, 100) + 1.0
    torch.testing.assert_close(share[capped:] * rank, (share[capped] * rank[0]).expand(100 - capped))
    torch.testing.assert_close(capped_zipf(4, 0.1, 1.0, 1.0, 1.0), 0.1 * torch.tensor([12.0, 6, 4, 3]).double() / 25)


def test_every_column_is_filled_to_its_quota_with_its_largest_entries():
    torch.manual_seed(0)
    u, selector = torch.randn(512, 64), built(2, 64, exponent=1.0)
    u[:, 5] = -1.0
    u[7:, 6] = -1.0
    z, quota = chosen(selector, u), selector.quotas(512)
    count, positive = (z != 0).sum(0), (u > 0).sum(0)
    assert torch.equal(count, torch.minimum(quota, positive)) and quota.sum() == 1024
    for i in range(64):
        assert torch.equal(z[:, i].sort().values[-int(count[i]) :] if count[i] else z[:0, i],
                           u[:, i].sort().values[-int(count[i]) :] if count[i] else z[:0, i])  # fmt: skip


def test_equal_quotas_leave_no_latent_dead_and_some_rows_without_a_latent():
    torch.manual_seed(0)
    z = chosen(built(1, 64, exponent=0.0), torch.randn(512, 64))
    assert ((z != 0).sum(0) == 8).all()
    empty = int((z != 0).sum(1).eq(0).sum())
    assert 100 < empty < 300  # (1 - 8 / 512)^64 = .365 of 512 rows


def test_a_row_without_a_latent_reconstructs_as_the_bias():
    torch.manual_seed(0)
    sae = SAE(8, 16, modalities=["image"], selector=FeatureChoice(1, exponent=0.0)).train()
    with torch.no_grad():
        sae.dictionaries["shared"].bias.normal_()
        out = sae({"image": torch.randn(64, 8)})["image"]
    none = out.codes.l0() == 0
    assert none.any() and not none.all()
    assert torch.equal(out.x_hat[none], sae.dictionaries["shared"].bias.expand(int(none.sum()), -1))


def test_degenerate_sizes():
    assert chosen(built(0.5, 1), torch.tensor([[1.0], [3], [2], [0.5]])).tolist() == [[0], [3], [2], [0]]
    u = torch.tensor([[1.0, 2, -1]])  # one row, a budget for each latent: every positive one is taken
    assert chosen(built(3, 3), u).tolist() == [[1, 2, 0]]


def test_ranks_follow_the_mass_that_no_quota_limits_when_they_are_due():
    torch.manual_seed(0)
    selector, scale = built(2, 16, every=3), 1.5 ** torch.arange(16.0)  # the last latent answers most
    seen = []
    for _ in range(4):
        chosen(selector, torch.rand(64, 16) * scale)
        selector.after_step_()
        seen.append(selector.rank[0].tolist())
    assert seen[0] == seen[1] == seen[2] == list(range(15, -1, -1))
    for _ in range(3):  # a starved latent whose affinity grows is given more, though its quota is 1
        chosen(selector, torch.rand(64, 16) * torch.cat([torch.tensor([1e6]), scale[1:]]))
        selector.after_step_()
    assert (
        selector.rank[0, 0] == 0 and (chosen(selector, torch.rand(64, 16))[:, 0] != 0).sum() == selector.quotas(64)[0]
    )


def test_modalities_have_their_own_ranks_and_thresholds():
    torch.manual_seed(0)
    selector, u = built(2, 16, ("image", "text")), torch.rand(64, 16) * torch.linspace(0.1, 2, 16)
    chosen(selector, u), chosen(selector, u.flip(1), "text")
    selector.after_step_()
    assert torch.equal(selector.rank[0], selector.rank[1].flip(0)) and selector.threshold("text").shape == (16,)


def test_after_training_it_is_jumprelu_with_the_thresholds_of_the_columns():
    torch.manual_seed(0)
    selector, u = built(2, 16), torch.randn(64, 16)
    u[:, 3] = -1  # never kept
    z = chosen(selector, u)
    least = torch.where(z > 0, z, torch.inf).amin(0)
    torch.testing.assert_close(selector.threshold("image"), least)
    new = torch.randn(40, 16)
    together = chosen(selector.eval(), new)
    torch.testing.assert_close(together, new * (new > least))
    assert not together[:, 3].any()
    assert torch.equal(chosen(selector, new[:1])[0], together[0])  # whatever the size of the batch


def test_another_k_has_other_quotas():
    selector = built(2, 16)
    assert selector.quotas(64).sum() == 128
    selector.set_k(3)
    assert selector.quotas(64).sum() == 192


def fires(fired):
    """Outputs of which only the codes matter."""
    return {"image": SAEOutput(None, Codes(fired, None, fired.shape[1], "image", None), None, None)}


def test_the_dying_are_those_below_their_share_of_zipf():
    sae = SAE(4, 10, modalities=["image"], selector=TopK(2))
    rank = torch.arange(10) + 1.0
    frequency = 0.5 / rank
    frequency[[6, 9]] *= 0.2  # of seventh and tenth rank
    g = torch.Generator().manual_seed(0)
    term = AuxZipf(dead_after=2000)
    for i in range(60):
        fired = (torch.rand(100, 10, generator=g) < frequency).float()
        dying = term.members(fires(fired), LossContext(sae))
        assert (dying is None) == (i < 19)
    assert dying.tolist() == [6, 9]
    torch.testing.assert_close(term.frequency[0] / term.known, frequency, atol=0.05, rtol=0)


def test_latents_that_always_fire_are_not_dying():
    """Without a cap the law would expect more of the first ranks than every row."""
    sae, term = SAE(4, 10, modalities=["image"], selector=TopK(2)), AuxZipf(dead_after=10)
    assert len(term.members(fires(torch.ones(50, 10)), LossContext(sae))) == 0


def test_options_are_checked():
    with pytest.raises(InputError, match=r"not 1\.0, 0 and 200"):
        FeatureChoice(offset=0)
    with pytest.raises(InputError, match=r"share must lie in \(0, 1\].*not 2"):
        AuxZipf(share=2)
