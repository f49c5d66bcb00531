import pytest
import torch

from mmsae.kernels.pairs import code_cosine
from mmsae.metrics import (
    CrossCorrelation,
    PairScorer,
    cross_correlation,
    derangement,
    groups_of,
    modality_score,
    pair_report,
    warnings_of,
)
from mmsae.metrics.pairs.pairs import alive_counts, top_concept, top_concept_agreement
from mmsae.types import Codes, InputError


def paired_codes(n=80, d=16, k=4, seed=0, noise=0.3):
    """Codes of two modalities that share most of a support; the last two latents are dead."""
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(n, d, generator=g)
    z[:, -2:] = -1
    sides = []
    for _ in range(2):
        v, i = (z + noise * torch.rand(n, d, generator=g)).topk(k, dim=1)
        sides.append(Codes(v.clamp(min=0), i, d))
    return sides


# ------------------------------------------------------------------------------------------------- shuffled partners
@pytest.mark.parametrize("n", [2, 3, 50])
def test_derangement_moves_everyone_and_is_seeded(n):
    p = derangement(n, seed=3)
    assert sorted(p.tolist()) == list(range(n)) and (p != torch.arange(n)).all()
    assert torch.equal(p, derangement(n, seed=3))
    assert n < 4 or not torch.equal(p, derangement(n, seed=4))


@pytest.mark.parametrize("groups", [["a"] * 50 + ["b"] * 50, ["a", "b"] * 3, ["a"] * 49 + list(map(str, range(51)))])
def test_derangement_never_pairs_equal_captions(groups):
    same = groups_of(groups)
    p = derangement(len(groups), 0, same)
    assert sorted(p.tolist()) == list(range(len(groups))) and (same[p] != same).all()


def test_derangement_with_classes_mixes_all_of_them():
    same = torch.arange(10).repeat(100)
    p = derangement(1000, 0, same)
    assert (same[p] != same).all() and len(torch.unique(same * 10 + same[p])) == 90


def test_derangement_says_when_there_is_none():
    with pytest.raises(InputError, match="3 pairs of which 2"):
        derangement(3, 0, groups_of(["a", "a", "b"]))
    with pytest.raises(InputError, match="1 pairs"):
        derangement(1)


# ------------------------------------------------------------------------------------------------------- agreement
def test_top_concept_agreement():
    image = Codes(torch.tensor([[1.0, 3], [2, 2], [0, 0], [5, 1]]), torch.tensor([[4, 2], [3, 1], [0, 1], [0, 1]]), 5)
    text = Codes(torch.tensor([[9.0], [1], [0], [1]]), torch.tensor([[2], [1], [0], [3]]), 5)
    assert top_concept(image).tolist() == [2, 1, -1, 0]  # equal values: the lower id; nothing fired: none
    assert torch.equal(top_concept(Codes(image.to_dense(), None, 5)), top_concept(image))
    assert top_concept_agreement(image, text) == 0.5


def test_the_strongest_latent_of_signed_codes_is_the_largest_and_agrees_with_its_sign():
    ids = torch.tensor([[0, 1]] * 3)
    image = Codes(torch.tensor([[1.0, -3.0], [1.0, -3.0], [-0.5, 0.0]]), ids, 3)
    text = Codes(torch.tensor([[2.0, -4.0], [2.0, 4.0], [-2.0, 1.0]]), ids, 3)
    assert top_concept(image).tolist() == [1, 1, 0]
    assert top_concept_agreement(image, text) == pytest.approx(2 / 3)
    dense = [Codes(c.to_dense(), None, 3) for c in (image, text)]
    assert top_concept_agreement(*dense) == pytest.approx(2 / 3)


def test_modality_score_examples():
    """spec/multimodal_saes.md section 2: mu(3, 1) = .75; disjoint supports are unimodal, equal codes bimodal."""
    s = modality_score(torch.tensor([3.0, 0, 4, 0]), torch.tensor([1.0, 2, 0, 0]))
    assert s.mu[:3].tolist() == [0.75, 0, 1] and s.mu[3].isnan()
    assert s.latents == pytest.approx(1 / 3) and s.energy == pytest.approx(4 / 10)
    e = torch.rand(5) + 0.1
    assert modality_score(e, e).latents == 1 and modality_score(e, e).energy == pytest.approx(1)


def test_alive_counts():
    assert alive_counts(torch.tensor([0.1, 0.2, 0, 0]), torch.tensor([0.5, 0, 0.1, 0])) == {
        "both": 1, "one": 2, "none": 1,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ correlation
def naive_correlation(a, b):
    return torch.stack([torch.corrcoef(torch.stack([a[:, j], b[:, j]]))[0, 1] for j in range(a.shape[1])])


@pytest.mark.parametrize("layout", ["sparse", "dense", "mixed"])
def test_cross_correlation_equals_corrcoef(layout):
    image, text = paired_codes()
    want = naive_correlation(image.to_dense().double(), text.to_dense().double())
    if layout != "sparse":
        text = Codes(text.to_dense(), None, 16)
    if layout == "dense":
        image = Codes(image.to_dense(), None, 16)
    got = cross_correlation(image, text)
    assert got[-2:].isnan().all() and not got[:-2].isnan().any()
    torch.testing.assert_close(got[:-2], want[:-2])


def test_cross_correlation_streams_and_merges():
    image, text = paired_codes()
    one, two = CrossCorrelation(16), CrossCorrelation(16)
    for lo, hi, m in ((0, 9, one), (9, 30, two), (30, 80, one)):
        m.update(image.rows(slice(lo, hi)), text.rows(slice(lo, hi)))
    one.merge_state(two)
    torch.testing.assert_close(one.compute(), cross_correlation(image, text), equal_nan=True)


def test_constant_latents_have_no_correlation():
    v = torch.full((1000, 1), 0.1)
    c = Codes(v, torch.zeros(1000, 1, dtype=torch.long), 1)
    assert cross_correlation(c, c).isnan().all()


# ------------------------------------------------------------------------------------------------------ pair scores
def test_pair_scorer_weights_by_positive_correlation_of_training_pairs():
    image, text = paired_codes()
    scorer = PairScorer.fit(image, text)
    corr = naive_correlation(image.to_dense(), text.to_dense()).nan_to_num(0).clamp(min=0)
    torch.testing.assert_close(scorer.weights, corr, atol=1e-5, rtol=1e-5)
    a, b = paired_codes(seed=1)
    s = scorer.codes(a, b)
    root = corr.sqrt()
    torch.testing.assert_close(s["pair_code"], torch.cosine_similarity(a.to_dense(), b.to_dense()))
    want = torch.cosine_similarity(a.to_dense() * root, b.to_dense() * root)
    torch.testing.assert_close(s["pair_weighted"], want, atol=1e-5, rtol=1e-5)


def test_clip_scores_ignore_scale_and_centred_removes_the_training_means():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=g) + 2, torch.randn(30, 5, generator=g) - 1
    c = paired_codes(30)
    s = PairScorer.fit(*c, x, y).embeddings(7 * x, y)
    u, v = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    torch.testing.assert_close(s["clip"], (u * v).sum(1))
    torch.testing.assert_close(s["clip_centred"], torch.cosine_similarity(u - u.mean(0), v - v.mean(0)))
    with pytest.raises(ValueError, match="clip_centred"):
        PairScorer.fit(*c).embeddings(x, y)


# ----------------------------------------------------------------------------------------------------------- report
def test_pair_report_of_matched_and_of_unrelated_codes():
    image, text = paired_codes()
    x = {"image": image.to_dense(), "text": text.to_dense()}
    r = pair_report(image, text, x=x, x_hat=x)
    assert r["code_cosine"]["pair"] == pytest.approx(code_cosine(image, text).mean().item())
    assert r["code_cosine"]["difference"] > 0.2
    assert r["recall"]["code"] == r["recall"]["embedding"] == r["recall"]["recon"]
    assert r["recall_at_1"] == pytest.approx(sum(v[1] for v in r["recall"]["code"].values()) / 2)
    assert r["recall_at_1"] > 0.5
    assert r["alive"] == {"both": 14, "one": 0, "none": 2}
    assert r["dead_fraction"] == 2 / 16
    assert r["bimodal"]["latents"] == 1 and r["correlation"]["median"] > 0.5
    assert r["warnings"] == []
    other = paired_codes(seed=9)[1]
    unrelated = pair_report(image, other)
    assert abs(unrelated["code_cosine"]["difference"]) < 0.1 and unrelated["recall_at_1"] < 0.1
    assert abs(unrelated["correlation"]["median"]) < 0.2


def test_split_dictionary_has_no_correlation_and_no_bimodal_latents():
    image, text = paired_codes(d=16)
    text = Codes(text.values, text.indices + 16, 32)
    r = pair_report(image._replace(d_sae=32), text)
    assert r["bimodal"] == {"latents": 0, "energy": 0} and r["correlation"] == {"median": 0, "above_half": 0}
    assert r["alive"] == {"both": 0, "one": 28, "none": 4} and r["recall_at_1"] == 0


def test_hub_latent_and_shuffled_cosine_are_warned_about():
    image, text = paired_codes()
    hub = [
        Codes(
            torch.cat([c.values, torch.full((80, 1), 20.0)], 1), torch.cat([c.indices, torch.full((80, 1), 15)], 1), 16
        )
        for c in (image, text)
    ]
    r = pair_report(*hub)
    assert r["code_cosine"]["shuffled"] > 0.9 and r["hubs"]["both"] == [15]
    assert len(r["warnings"]) == 2 and warnings_of(r) == r["warnings"]
    assert "shuffled" in r["warnings"][0] and "15" in r["warnings"][1]


def test_pair_report_refuses_what_are_not_pairs():
    image, text = paired_codes()
    with pytest.raises(InputError, match="80 x 16 image and 79 x 16"):
        pair_report(image, text.rows(slice(1, 80)))
