import pytest
import torch

from mmsae.filtering.truth import Side, mismatch, pair_scores
from mmsae.metrics import PairScorer, auroc, derangement
from mmsae.types import Codes, InputError


def sides(n=150, d=8, d_sae=20, seed=0):
    """Images and captions of one meaning; latent 19 is loud, often on, and says nothing."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    w = torch.randn(d_sae - 1, d, generator=torch.Generator().manual_seed(99))
    out = []
    for _ in range(2):
        y = x + 0.3 * torch.randn(n, d, generator=g)
        v, i = (y @ w.T).relu().topk(4, dim=1)
        hub = 12.0 * (torch.rand(n, 1, generator=g) < 0.5)
        out.append(Side(Codes(torch.cat([v, hub], 1), torch.cat([i, torch.full((n, 1), d_sae - 1)], 1), d_sae), y))
    return out


def test_swapped_captions_are_found_and_weighting_ignores_the_hub():
    train, (image, text) = sides(seed=1), sides(seed=2)
    scorer = PairScorer.fit(train[0].codes, train[1].codes, train[0].x, train[1].x)
    r = mismatch(scorer, image, text, text.rows(derangement(150)))
    assert list(r) == ["pair_code", "pair_weighted", "clip", "clip_centred"]
    assert r["pair_weighted"] > 0.9 and r["pair_weighted"] > r["pair_code"] + 0.1 and r["clip_centred"] > 0.95


def test_undamaged_pairs_are_at_chance_and_direction_is_right():
    image, text = sides()
    scorer = PairScorer.fit(image.codes, text.codes)
    assert mismatch(scorer, image, text, text) == {"pair_code": 0.5, "pair_weighted": 0.5}
    swapped = text.rows(derangement(150))
    assert mismatch(scorer, image, swapped, text)["pair_weighted"] < 0.1
    got = mismatch(scorer, image, text, swapped)["pair_code"]
    assert got == auroc(pair_scores(scorer, image, text)["pair_code"], pair_scores(scorer, image, swapped)["pair_code"])


def test_row_counts_must_agree():
    image, text = sides()
    with pytest.raises(InputError, match="150 images, 150 clean and 149 damaged"):
        mismatch(PairScorer.fit(image.codes, text.codes), image, text, text.rows(torch.arange(149)))
