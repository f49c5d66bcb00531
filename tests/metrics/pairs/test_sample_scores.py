import math

import pytest
import torch

from mmsae.metrics.pairs.item_codes import max_pool
from mmsae.metrics.pairs.sample_scores import SCORES, sample_scores
from mmsae.types import Codes, InputError, Tokens

BOS, WORD = [0, 0, 9, 9, 9], [2, 0.5, 0, 0, 0]
PATCHES = [[0, 3, 0, 1.5, 0], [2.5, 0, 0, 0.2, 4]]
W = torch.tensor([0.2, 0.3, math.nan, 0.5, math.nan])
TOY = {"l0": 7 / 3, "l1": 13.7 / 3, "cos_algorithm": 1.0, "cos_mean": 0.195455}


def toy(text, image, items=1):
    """Items with the same tokens; the first text token of each is BOS."""
    rows = {"text": torch.tensor(text, dtype=torch.float), "image": torch.tensor(image, dtype=torch.float)}
    codes = {m: Codes(v.repeat(items, 1), None, 5) for m, v in rows.items()}
    item = {m: torch.arange(items).repeat_interleave(len(v)) for m, v in rows.items()}
    special = {m: torch.zeros(items * len(v), dtype=torch.bool) for m, v in rows.items()}
    special["text"][:: len(text)] = True
    x = {m: torch.zeros(len(i), 2) for m, i in item.items()}
    return codes, Tokens(x, item, [f"{i:032x}" for i in range(items)], None, special)


def topk(codes, k=4):
    values, indices = codes.values.topk(k, 1)
    return Codes(values, indices, codes.d_sae)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("delta", "want"),
    [(0.0, {"co_l0": 2, "co_l1": 2.5, "cos_code": 0.5}), (1.0, {"co_l0": 1, "co_l1": 2, "cos_code": 0.2})],
)
def test_toy_sample(delta, want, sparse):
    codes, tokens = toy([BOS, WORD], PATCHES, items=3)
    if sparse:
        codes = {m: topk(c) for m, c in codes.items()}
    got = sample_scores(codes, tokens, W, delta)
    for name, value in {**TOY, **want, "n_image": 2, "n_text": 1}.items():
        assert got[name].tolist() == pytest.approx([value] * 3, abs=1e-6), name
    assert set(got) == {*SCORES, "n_image", "n_text"}


def test_the_first_token_does_not_matter():
    codes, tokens = toy([BOS, WORD], PATCHES)
    other, _ = toy([[7, 7, 0, 7, 0], WORD], PATCHES)
    a, b = sample_scores(codes, tokens, W), sample_scores(other, tokens, W)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_text_only_shares_nothing():
    codes, tokens = toy([BOS, WORD], PATCHES)
    del codes["image"]
    got = sample_scores(codes, tokens, W)
    assert [got[n].item() for n in ("co_l0", "co_l1", "cos_code", "n_image")] == [0, 0, 0, 0]
    assert got["l0"].item() == 2 and got["cos_algorithm"].item() == pytest.approx(0.5)


def test_without_weights_there_are_no_cosine_scores():
    got = sample_scores(*toy([BOS, WORD], PATCHES))
    assert set(got) == {"l0", "l1", "co_l0", "co_l1", "n_image", "n_text"}


def random_batch(seed, d=20, items=6):
    g = torch.Generator().manual_seed(seed)
    codes, item = {}, {}
    for m, n in (("image", 50), ("text", 21)):
        v = torch.rand(n, 3, generator=g) * 3 - 0.5
        codes[m] = Codes(v.relu(), torch.rand(n, d, generator=g).argsort(1)[:, :3], d)
        item[m] = torch.randint(0, items - 1, (n,), generator=g)  # the last item has no token
    x = {m: torch.zeros(len(i), 1) for m, i in item.items()}
    return codes, Tokens(x, item, [f"{i:032x}" for i in range(items)]), torch.rand(d, generator=g)


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_sparse_scores_equal_the_definition(delta):
    codes, tokens, w = random_batch(0)
    w[3] = torch.nan
    got = sample_scores(codes, tokens, w, delta)
    dense = {m: c.to_dense().double() for m, c in codes.items()}
    for i in range(6):
        v, x = (dense[m][tokens.item[m] == i] for m in ("image", "text"))
        both = torch.cat([v, x])
        if not len(both):
            assert all(got[n][i] == 0 for n in got)
            continue
        top_v, top_x = (t.amax(0) if len(t) else torch.zeros(20).double() for t in (v, x))
        c, f = (top_v > delta) & (top_x > delta), (top_v > delta) | (top_x > delta)
        top = torch.maximum(top_v, top_x)[f]
        wk = w.double().nan_to_num(0)
        want = {
            "l0": (both > 0).sum(1).double().mean(),
            "l1": both.sum(1).mean(),
            "co_l0": c.sum(),
            "co_l1": torch.minimum(top_v, top_x)[c].sum(),
            "cos_code": wk[c].sum(),
            "cos_algorithm": wk[f].sum(),
            "cos_mean": (wk[f] * top).sum() / top.sum(),
        }
        for name, value in want.items():
            assert got[name][i].item() == pytest.approx(value.item(), abs=1e-9), name


def test_bounds_permutations_and_copies():
    codes, tokens, w = random_batch(1)
    got = sample_scores(codes, tokens, w)
    assert (got["cos_code"] <= got["cos_algorithm"] + 1e-12).all()
    order = {m: torch.randperm(c.n, generator=torch.Generator().manual_seed(2)) for m, c in codes.items()}
    for pick in (order, {m: torch.arange(c.n).repeat(2) for m, c in codes.items()}):
        other = {m: c.rows(pick[m]) for m, c in codes.items()}
        item = {m: i[pick[m]] for m, i in tokens.item.items()}
        again = sample_scores(other, tokens._replace(item=item), w)
        for name in SCORES:
            torch.testing.assert_close(again[name], got[name], rtol=0, atol=1e-9)


def test_items_do_not_see_their_batch():
    codes, tokens, w = random_batch(3)
    whole = sample_scores(codes, tokens, w)
    keep = {m: i == 2 for m, i in tokens.item.items()}
    alone = sample_scores(
        {m: c.rows(keep[m]) for m, c in codes.items()},
        Tokens({}, {m: torch.zeros(int(k.sum()), dtype=torch.long) for m, k in keep.items()}, ["0" * 32]),
        w,
    )
    assert all(alone[n][0].item() == pytest.approx(whole[n][2].item(), abs=1e-12) for n in SCORES)


def test_pooled_codes_of_items():
    codes, tokens, _ = random_batch(4)
    got = max_pool(codes["text"], tokens.item["text"]).codes(6)
    dense = codes["text"].to_dense()
    want = [
        dense[tokens.item["text"] == i].amax(0) if (tokens.item["text"] == i).any() else 0 * dense[0] for i in range(6)
    ]
    assert torch.equal(got.to_dense(), torch.stack(want))
    assert all(len(set(row)) == len(row) for row in got.indices.tolist()) and got.indices.max() < 20


def test_codes_with_signs_are_refused():
    codes, tokens = toy([BOS, [2, -0.5, 0, 0, 0]], PATCHES)
    with pytest.raises(InputError, match="need codes without signs"):
        sample_scores(codes, tokens, W)
