import pytest
import torch

from mmsae.metrics.pairs.cross_modal import CrossModalWeights, pair_weight
from mmsae.types import Codes, InputError, Tokens

S = 2**-0.5
TEXT = torch.tensor([[1.0, 0], [0, 1]])
IMAGE = torch.tensor([[1.0, 0], [S, S]])
D, K, WIDTH = 12, 4, 5


def batch(n_items, seed, special=True, first=0):
    """Codes and tokens of some items with 3 text and 7 image tokens each; values have many ties."""
    g = torch.Generator().manual_seed(seed)
    codes, x, item, position, flags = {}, {}, {}, {}, {}
    for m, n, start in (("text", 3, 0), ("image", 7, 3)):
        rows = n_items * n
        codes[m] = Codes(
            torch.randint(0, 5, (rows, K), generator=g) / 4, torch.rand(rows, D, generator=g).argsort(1)[:, :K], D
        )
        x[m] = torch.randn(rows, WIDTH, generator=g)
        item[m] = torch.arange(n_items).repeat_interleave(n)
        position[m] = torch.arange(start, start + n).repeat(n_items)
        flags[m] = (position[m] == 0) if special else torch.zeros(rows, dtype=torch.bool)
    uids = [f"{(first + i) * 7919 % 997:032x}" for i in range(n_items)]
    return codes, Tokens(x, item, uids, position, flags)


def part_of(codes, tokens, items):
    keep = {m: torch.isin(tokens.item[m], items) for m in codes}
    where = torch.full((len(tokens.uids),), -1)
    where[items] = torch.arange(len(items))
    return {m: c.rows(keep[m]) for m, c in codes.items()}, Tokens(
        {m: v[keep[m]] for m, v in tokens.x.items()},
        {m: where[v[keep[m]]] for m, v in tokens.item.items()},
        [tokens.uids[i] for i in items],
        {m: v[keep[m]] for m, v in tokens.position.items()},
        {m: v[keep[m]] for m, v in tokens.special.items()},
    )


def naive(codes, tokens, mode, selection, n_pool, n_side, delta, center=False):
    """The definition, one latent at a time."""
    out = torch.full((D,), torch.nan, dtype=torch.float64)
    content = {m: (~tokens.special[m]).nonzero()[:, 0].tolist() for m in codes}
    mean = torch.cat([tokens.x[m][content[m]] for m in ("image", "text")]).double().mean(0)
    for k in range(D):
        found = []
        for m, rows in content.items():
            z = codes[m].to_dense()[:, k]
            found += [
                (-float(z[r]), tokens.uids[tokens.item[m][r]], int(tokens.position[m][r]), m, r)
                for r in rows
                if z[r] > delta
            ]
        found.sort()
        if selection == "pooled":
            found = found[:n_pool]
        sides = [[f for f in found if f[3] == m][:n_side] for m in ("text", "image")]
        if min(map(len, sides)) == n_side:
            h = [torch.stack([tokens.x[f[3]][f[4]].double() for f in side]) for side in sides]
            out[k] = pair_weight(*(v - mean * center for v in h), mode)
    return out


def run(parts, **options):
    metric = CrossModalWeights(D, WIDTH, **options)
    for codes, tokens in parts:
        metric.update(codes, tokens)
    return metric.compute()


@pytest.mark.parametrize(
    ("mode", "want"), [("all_pairs", 0.603553), ("rank_matched", 0.853553), ("centroid", 0.923880)]
)
def test_hand_computed_weights(mode, want):
    assert pair_weight(TEXT, IMAGE, mode).item() == pytest.approx(want, abs=1e-6)
    assert pair_weight(IMAGE, TEXT, mode).item() == pytest.approx(want, abs=1e-6)
    assert pair_weight(TEXT * torch.tensor([[3.0], [0.1]]), IMAGE * 7, mode).item() == pytest.approx(want, abs=1e-6)


def test_all_pairs_is_the_mean_over_pairs():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 8, generator=g).double(), torch.randn(5, 8, generator=g).double()
    pairs = torch.cosine_similarity(a[:, None], b[None], dim=-1)
    assert pair_weight(a, b).item() == pytest.approx(pairs.mean().item(), abs=1e-12)
    assert pair_weight(a, b, "rank_matched").item() == pytest.approx(pairs.diag().mean().item(), abs=1e-12)


@pytest.mark.parametrize("mode", ["all_pairs", "rank_matched", "centroid"])
def test_parallel_vectors_have_weight_one_and_zero_vectors_count_zero(mode):
    v = torch.tensor([[1.0, 2], [2, 4]])
    assert pair_weight(v, 3 * v, mode).item() == pytest.approx(1)
    half = torch.tensor([[1.0, 2], [0, 0]])
    want = {"all_pairs": 0.5, "rank_matched": 0.5, "centroid": 1.0}[mode]
    assert pair_weight(half, v, mode).item() == pytest.approx(want)
    assert pair_weight(0 * v, v, mode).item() == 0


@pytest.mark.parametrize("mode", ["all_pairs", "rank_matched", "centroid"])
@pytest.mark.parametrize(("selection", "n_pool"), [("pooled", 8), ("pooled", 30), ("per_modality", 30)])
def test_streaming_equals_the_definition(mode, selection, n_pool):
    codes, tokens = batch(12, seed=1)
    options = {"mode": mode, "selection": selection, "n_pool": n_pool, "n_side": 3, "delta": 0.3}
    want = naive(codes, tokens, **options)
    got = run([part_of(codes, tokens, i) for i in torch.arange(12).split(5)], **options)
    torch.testing.assert_close(got.weights, want, rtol=0, atol=1e-9, equal_nan=True)
    assert 0 < got.weights.isfinite().sum() and (n_pool == 30 or got.weights.isnan().any())


def test_order_and_batches_do_not_matter():
    codes, tokens = batch(30, seed=2)
    options = {"selection": "per_modality", "n_side": 4}
    want = run([(codes, tokens)], **options)
    for seed in range(3):
        order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
        got = run([part_of(codes, tokens, i) for i in order.split(seed + 2)], **options)
        assert torch.equal(got.weights, want.weights)
        assert torch.equal(got.evidence["image"], want.evidence["image"])


def test_dense_codes_give_the_same():
    codes, tokens = batch(9, seed=3)
    dense = {m: Codes(c.to_dense(), None, D) for m, c in codes.items()}
    got, want = run([(dense, tokens)]), run([(codes, tokens)])
    torch.testing.assert_close(got.weights, want.weights, equal_nan=True)


def test_special_tokens_are_not_seen():
    codes, tokens = batch(9, seed=4)
    marked = tokens.special["text"]
    assert marked.any()
    changed = {**tokens.x, "text": torch.where(marked[:, None], 100.0, tokens.x["text"])}
    wild = codes["text"]._replace(values=torch.where(marked[:, None], 99.0, codes["text"].values))
    got = run([({**codes, "text": wild}, tokens._replace(x=changed))], center=True)
    want = run([(codes, tokens)], center=True)
    assert torch.equal(got.weights.nan_to_num(9), want.weights.nan_to_num(9))
    assert got.tokens == {"image": 63, "text": 18}


def test_center_takes_the_common_mean_off():
    codes, tokens = batch(12, seed=5)
    tokens = tokens._replace(x={m: v + 10 for m, v in tokens.x.items()})
    options = {"mode": "all_pairs", "selection": "per_modality", "n_pool": 30, "n_side": 3, "delta": 0.0}
    got = run([(codes, tokens)], center=True, **options)
    torch.testing.assert_close(got.weights, naive(codes, tokens, center=True, **options), rtol=0, atol=1e-6)
    assert run([(codes, tokens)], **options).weights.min() > 0.9 > got.weights.max()


def test_entries_at_delta_are_no_evidence_and_too_few_give_nan():
    codes, tokens = batch(12, seed=6)
    assert run([(codes, tokens)], delta=1.0).weights.isnan().all()  # the largest value is 1
    none = run([(codes, tokens)], selection="per_modality", n_side=40)
    assert none.weights.isnan().all() and none.coverage == 0
    some = run([(codes, tokens)], selection="per_modality", delta=0.75)
    assert (some.weights.isfinite() == (torch.stack(list(some.evidence.values())) == 5).all(0)).all()


def test_delta_as_a_quantile():
    codes, tokens = batch(40, seed=7, special=False)
    values = torch.cat([c.values[c.values > 0] for c in codes.values()])
    for q in (0.0, 0.3, 0.6, 0.9):
        got = run([(codes, tokens)], delta_quantile=q).delta
        want = torch.quantile(values, q, interpolation="lower").item() if q else 0.0
        assert want * (1 - 2**-7) <= got <= want
    scaled = {m: c._replace(values=c.values * 64) for m, c in codes.items()}
    a, b = run([(codes, tokens)], delta_quantile=0.6), run([(scaled, tokens)], delta_quantile=0.6)
    assert torch.equal(a.weights.nan_to_num(9), b.weights.nan_to_num(9))


def test_parts_merge_to_the_whole_and_tokens_count_once_in_tables():
    codes, tokens = batch(30, seed=8)
    for selection in ("pooled", "per_modality"):
        options = {"selection": selection, "n_side": 4}
        want = run([(codes, tokens)], **options)
        whole = CrossModalWeights(D, WIDTH, **options)
        for i in torch.arange(30).split(7):
            one = CrossModalWeights(D, WIDTH, **options)
            one.update(*part_of(codes, tokens, i))
            part = one.part()
            assert len(part["x"]) <= 2 * D * 4
            whole.merge(part)
        got = whole.compute()
        assert torch.equal(got.weights.nan_to_num(9), want.weights.nan_to_num(9))
        assert torch.equal(got.fired["text"], want.fired["text"])
        whole.update(*part_of(codes, tokens, torch.arange(5)))  # seen before
        assert torch.equal(whole.compute().weights.nan_to_num(9), want.weights.nan_to_num(9))


def test_memory_does_not_grow_with_the_tokens():
    metric = CrossModalWeights(D, WIDTH, selection="per_modality", n_side=2)
    for seed in range(40):
        metric.update(*batch(10, seed, first=10 * seed))
    assert len(metric.vectors[0]) <= 2 * 2 * D * 2 * 1.5
    metric.reset()
    assert metric.compute().weights.isnan().all() and metric.compute().coverage == 0


def test_matched_pairs_outweigh_shuffled_ones():
    """A latent that reads one direction in both modalities has a larger weight than one whose sides are unrelated."""
    g = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=g))[0]
    codes, x = {}, {}
    for m, column in (("image", torch.arange(8) % 8), ("text", torch.arange(8) + 8)):
        index = torch.arange(8).repeat(20)
        shared = index < 4
        x[m] = torch.where(shared[:, None], directions[index], directions[column[index]])
        x[m] = x[m] + 0.1 * torch.randn(len(index), 16, generator=g)
        codes[m] = Codes(torch.ones(len(index), 1), index[:, None], 8)
    item = {m: torch.arange(160) for m in x}
    tokens = Tokens(x, item, [f"{i:032x}" for i in range(160)])
    metric = CrossModalWeights(8, 16, selection="per_modality")
    metric.update(codes, tokens)
    w = metric.compute().weights
    assert w[:4].min() > 0.7 and w[4:].abs().max() < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mean"}, "mode of cross-modal weights must be one of"),
        ({"selection": "all"}, "selection of cross-modal weights"),
        ({"n_pool": 8}, "n_pool is 8, but two sides of n_side 5 need at least 10"),
        ({"n_side": 0}, "n_side is 0"),
        ({"delta_quantile": 1.0}, "delta_quantile must be in"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        CrossModalWeights(D, WIDTH, **options)


def test_codes_of_other_tokens_are_refused():
    codes, tokens = batch(4, seed=0)
    with pytest.raises(InputError, match="5 rows of text codes for 12 text tokens"):
        run([({"text": codes["text"].rows(slice(0, 5))}, tokens)])
