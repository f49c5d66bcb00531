"""Latents that are kept, ordered and matched, against the oracles of multimodal_saes, sections 5 and 8."""

import copy
from itertools import permutations

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.metrics.pairs.panel import CorrelationPanel
from mmsae.sae import (
    AffineEncoder,
    ArchetypalDictionary,
    BatchTopK,
    Dictionary,
    GroupBias,
    JumpReLU,
    PerModalityEncoder,
    ReLU,
    TopK,
    match_latents,
    matching,
    prune_latents,
    select_latents,
)
from tests.helpers.recipes import SAE_RECIPES, Run, batch, small_model


def two(selector=None, d_sae=48):
    torch.manual_seed(0)
    own = {m: Dictionary() for m in ("image", "text")}
    sae = SAE(16, d_sae, selector=selector or TopK(4), encoder=PerModalityEncoder(AffineEncoder()), dictionaries=own)
    sae.fit_normaliser(batch(sae, 256, seed=9).x)
    return sae.eval()


def codes(sae, n=200):
    with torch.no_grad():
        return {m: out.codes for m, out in sae.eval()(batch(sae, n)).items()}


def panel(sae, n=200):
    metric = CorrelationPanel(sae.d_sae)
    metric.update(*codes(sae, n).values())
    return metric.compute()


@pytest.mark.parametrize("path", SAE_RECIPES, ids=lambda p: p.stem)
def test_latents_in_another_order_say_the_same_whatever_the_parts(path, tmp_path):
    torch.manual_seed(0)
    sae, losses = small_model(path)
    sae.fit_normaliser(batch(sae, 256, seed=9).x)
    Run(sae, losses).go(3)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    if sae.selector.by_place:
        with pytest.raises(InputError, match="goes by the places of latents"):
            select_latents(sae.eval(), order)
        return
    moved = select_latents(sae.eval(), order)
    tokens = batch(sae, 32)
    with torch.no_grad():
        for m, out in moved(tokens).items():
            want = sae(tokens)[m]
            torch.testing.assert_close(out.codes.to_dense(), want.codes.to_dense()[:, order], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out.x_hat, want.x_hat, rtol=1e-4, atol=1e-5)
    again = SAE.from_pretrained(moved.save_pretrained(tmp_path / "sae"))
    for m, c in codes(again, 8).items():
        assert torch.equal(c.to_dense(), codes(moved, 8)[m].to_dense())


def test_what_is_left_out_is_gone_and_the_rest_is_as_it_was():
    sae = two(ReLU())
    ids = [3, 40, 7]
    few = select_latents(sae, ids)
    assert few.d_sae == 3 and not few.training and few.sites == sae.sites
    for m, c in codes(few).items():
        torch.testing.assert_close(c.to_dense(), codes(sae)[m].to_dense()[:, ids])
        assert torch.equal(few.dictionary(m).weight, sae.dictionary(m).weight[ids])
        assert torch.equal(few.dictionary(m).bias, sae.dictionary(m).bias)
    assert few.normaliser.fitted and not few.fresh
    square = SAE(8, 8, modalities=["image"], selector=TopK(2))  # as many latents as features
    square.dictionary("image").bias.data.copy_(torch.arange(8.0))
    assert torch.equal(select_latents(square, list(range(7, -1, -1))).dictionary("image").bias, torch.arange(8.0))


@pytest.mark.parametrize(
    "ids, message",
    [([], "distinct"), ([1, 1], "distinct"), ([[1], [2]], "distinct"), ([0, 48], "0 to 47, not 0 to 48"),
     ([-1, 3], "not -1 to 3"), ([0, 1, 2], "k = 4 does not fit d_sae = 3")],
)  # fmt: skip
def test_ids_that_are_no_latents_are_refused(ids, message):
    with pytest.raises(InputError, match=message):
        select_latents(two(), ids)


def test_pruning_keeps_the_best_in_their_order():
    sae = two()
    scores = torch.rand(48, generator=torch.Generator().manual_seed(0))
    scores[[5, 6]] = torch.tensor([torch.nan, 9.0])
    few = prune_latents(sae, scores, 20)
    ids = scores.nan_to_num(-1).topk(20).indices.sort().values
    assert 6 in ids and 5 not in ids
    assert torch.equal(few.dictionary("text").weight, sae.dictionary("text").weight[ids])
    with pytest.raises(InputError, match=r"\(47,\) scores and keep 20"):
        prune_latents(sae, scores[1:], 20)
    with pytest.raises(InputError, match="keep 49"):
        prune_latents(sae, scores, 49)


def test_a_permuted_copy_is_matched_exactly_and_reconstructs_as_before(tmp_path):
    sae = two()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(2))
    moved = select_latents(sae, order)
    pair = copy.deepcopy(sae)  # text is a permuted copy of image
    pair.encoder.encoders["text"] = copy.deepcopy(moved.encoder.encoders["image"])
    pair.dictionaries["text"] = copy.deepcopy(moved.dictionaries["image"])
    x = batch(pair, 400).x["image"]
    tokens = {"image": x, "text": x}
    with torch.no_grad():
        before = pair(tokens)
    metric = CorrelationPanel(48)
    metric.update(before["image"].codes, before["text"].codes)
    got = match_latents(pair, metric.compute())
    with torch.no_grad():
        after = got(tokens)
    alive = (before["image"].codes.to_dense() != 0).any(0)
    assert alive.sum() > 20
    z, w = (after[m].codes.to_dense()[:, alive] for m in ("image", "text"))
    torch.testing.assert_close(z, w)
    assert torch.equal(z, before["image"].codes.to_dense()[:, alive])
    for m in tokens:
        torch.testing.assert_close(after[m].x_hat, before[m].x_hat, rtol=1e-5, atol=1e-6)
    again = SAE.from_pretrained(got.save_pretrained(tmp_path / "sae"))
    torch.testing.assert_close(again(tokens)["text"].codes.to_dense(), after["text"].codes.to_dense())


def test_no_dead_row_takes_a_partner_that_an_alive_row_wants():
    c = torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.8
    c[[1, 5]], c[:, [0, 2, 7]] = torch.nan, torch.nan
    match = matching(c)
    assert sorted(match.tolist()) == list(range(8))
    known = ~c[torch.arange(8), match].isnan()
    assert int(known.sum()) == 5  # all columns that are alive have a partner that is
    rows, columns = [0, 2, 3, 4, 6, 7], [1, 3, 4, 5, 6]
    best = max(sum(float(c[r, k]) for r, k in zip(p, columns, strict=True)) for p in permutations(rows, 5))
    assert float(c[torch.arange(8), match][known].sum()) == pytest.approx(best)


def test_matched_latents_of_shuffled_pairs_correlate_less():
    torch.manual_seed(0)
    sae = two()
    run = Run(sae, small_model(next(p for p in SAE_RECIPES if p.stem == "dual_topk"))[1])
    run.go(150)
    c = codes(sae, 600)
    true, shuffled = CorrelationPanel(48), CorrelationPanel(48)
    true.update(c["image"], c["text"])
    shuffled.update(c["image"], c["text"].rows(torch.arange(600).roll(1)))
    means = []
    for p in (true.compute(), shuffled.compute()):
        means.append(float(p[torch.arange(48), matching(p)].nanmean()))
    assert means[0] > 0.3 and means[1] < 0.6 * means[0], means


def test_thresholds_of_a_modality_go_with_its_latents_and_shared_parts_are_refused():
    sae = two(JumpReLU(per_modality=True))
    with torch.no_grad():
        sae.selector.thresholds.copy_(torch.rand(2, 48).log())
    p = torch.rand(48, 48, dtype=torch.float64)
    got, order = match_latents(sae, p), matching(p)
    assert torch.equal(got.selector.thresholds[0], sae.selector.thresholds[0])
    assert torch.equal(got.selector.thresholds[1], sae.selector.thresholds[1][order])
    with pytest.raises(InputError, match="selector 'jumprelu' has a thresholds that the modalities share"):
        match_latents(two(JumpReLU()), p)
    match_latents(two(BatchTopK(4)), p)
    with pytest.raises(InputError, match="encoder 'affine' and dictionaries"):
        match_latents(SAE(16, 48, dictionaries={m: Dictionary() for m in ("image", "text")}), p)
    with pytest.raises(InputError, match=r"\(40, 40\) correlations does not fit 48"):
        match_latents(sae, p[:40, :40])
    with pytest.raises(InputError, match=r"shape \(d_sae, d_sae\), not \(40, 48\)"):
        matching(p[:40])


def test_groups_of_biases_stay_with_their_latents():
    torch.manual_seed(0)
    sae = SAE(16, 40, modalities=["image"], encoder=GroupBias(groups=4), selector=ReLU())
    moved = select_latents(sae, list(range(39, -1, -1)))
    assert torch.equal(moved.encoder.group, sae.encoder.group.flip(0))
    assert len(moved.encoder.target) == 4


def test_an_archetypal_dictionary_with_a_point_for_each_atom_keeps_them_all():
    for points, message in ((None, "has the number of latents twice"), (60, None)):
        own = {"shared": ArchetypalDictionary(points)}
        sae = SAE(16, 40, modalities=["image"], selector=TopK(4), dictionaries=own)
        if message is None:
            rows = select_latents(sae, [3, 1, 4, 0]).dictionary("image").rows()
            torch.testing.assert_close(rows, sae.dictionary("image").rows()[[3, 1, 4, 0]])
        else:
            with pytest.raises(InputError, match=message):
                select_latents(sae, [3, 1, 4, 0])
