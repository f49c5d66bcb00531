import pytest
import torch

from mmsae.metrics import both_ways, groups_of, recall_at
from mmsae.metrics.statistics import (
    auroc,
    auroc_columns,
    auroc_table,
    average_ranks,
    balanced_interval,
    centred_ranks,
    pessimistic_ranks,
    spearman,
    wilson,
)
from mmsae.types import Codes


def brute_auroc(pos, neg):
    d = pos[:, None].double() - neg[None].double()
    return ((d > 0).double() + 0.5 * (d == 0).double()).mean().item()


def test_average_ranks_with_ties():
    x = torch.tensor([[3.0, 1], [1, 1], [3, 1], [2, 1]])
    assert average_ranks(x).T.tolist() == [[3.5, 1, 3.5, 2], [2.5] * 4]


def test_auroc_against_all_pairs_with_many_ties():
    g = torch.Generator().manual_seed(0)
    pos, neg = torch.randint(0, 6, (40,), generator=g), torch.randint(0, 5, (30,), generator=g)
    assert auroc(pos, neg) == pytest.approx(brute_auroc(pos, neg), abs=1e-12)
    assert auroc(torch.ones(3), torch.ones(4)) == 0.5
    assert auroc(torch.tensor([2.0]), torch.tensor([1.0])) == 1


def test_auroc_oracle():
    """spec/probing.md section 13: .8125."""
    assert auroc(torch.tensor([0.9, 0.8, 0.7, 0.2]), torch.tensor([0.65, 0.3, 0.25, 0.1])) == pytest.approx(0.8125)


def test_auroc_tables_equal_the_single_ones():
    g = torch.Generator().manual_seed(1)
    scores, truth = torch.randint(0, 4, (50, 7), generator=g).float(), torch.rand(50, 3, generator=g) > 0.6
    table = auroc_table(scores, truth)
    for c in range(3):
        for j in range(7):
            want = brute_auroc(scores[truth[:, c], j], scores[~truth[:, c], j])
            assert table[c, j].item() == pytest.approx(want, abs=1e-12)
    torch.testing.assert_close(auroc_columns(scores[:, :3], truth), table.diagonal())
    assert auroc_table(scores, torch.ones(50, 1, dtype=torch.bool)).isnan().all()


def test_auroc_refuses_nan_and_empty():
    with pytest.raises(ValueError, match="1"):
        auroc(torch.tensor([float("nan")]), torch.ones(2))
    with pytest.raises(ValueError, match="0"):
        auroc(torch.ones(0), torch.ones(2))


def test_ties_count_against_the_truth():
    scores = torch.tensor([[1.0, 1, 0], [0, 1, 0.5]])
    right = torch.tensor([[True, False, False], [False, True, False]])
    assert pessimistic_ranks(scores, right).tolist() == [1, 0]


def test_collapsed_codes_retrieve_nothing_and_perfect_ones_everything():
    n = 20
    flat = Codes(torch.ones(n, 2), torch.tensor([[0, 1]]).expand(n, 2), 30)
    assert recall_at(flat, flat, ks=(1, 10, 20)) == {1: 0.0, 10: 0.0, 20: 1.0}
    one_hot = Codes(torch.ones(n, 1), torch.arange(n)[:, None], 30)
    assert recall_at(one_hot, one_hot, ks=(1,)) == {1: 1.0}
    zero = one_hot._replace(values=torch.zeros(n, 1))
    assert recall_at(zero, zero, ks=(1,)) == {1: 0.0}


def naive_recall(q, k, same, ks):
    q, k = torch.nn.functional.normalize(q, dim=1), torch.nn.functional.normalize(k, dim=1)
    hits = dict.fromkeys(ks, 0)
    for i in range(len(q)):
        s = [float(q[i] @ k[j]) for j in range(len(k))]
        best = max(s[j] for j in range(len(k)) if same[j] == same[i])
        worse = sum(s[j] >= best - 1e-6 for j in range(len(k)) if same[j] != same[i])
        for c in ks:
            hits[c] += worse < c
    return {c: h / len(q) for c, h in hits.items()}


@pytest.mark.parametrize("kind", ["embedding", "sparse", "dense"])
def test_recall_equals_the_loop_with_groups_and_chunks(kind):
    g = torch.Generator().manual_seed(3)
    n, d = 45, 12
    a = torch.rand(n, d, generator=g) * (torch.rand(n, d, generator=g) > 0.6)
    b = a + 0.5 * torch.rand(n, d, generator=g) * (torch.rand(n, d, generator=g) > 0.6)
    a[3], b[3] = a[4], b[4]  # tie of two different captions
    same = groups_of([f"caption {i % 40}" for i in range(n)])
    want = naive_recall(a, b, same, (1, 5, 10))
    if kind == "sparse":
        (va, ia), (vb, ib) = a.topk(d, dim=1), b.topk(d, dim=1)
        a, b = Codes(va, ia, d), Codes(vb, ib, d)
    elif kind == "dense":
        a, b = Codes(a, None, d), Codes(b, None, d)
    assert recall_at(a, b, same, chunk=7) == pytest.approx(want)
    assert both_ways(a, b, same)["image_to_text"] == pytest.approx(want)
    assert 0.2 < want[1] < 1  # the example is neither trivial nor hopeless


def test_equal_captions_are_right_answers_of_each_other():
    image = torch.eye(4)
    text = torch.eye(4)[[1, 0, 2, 3]]  # captions 0 and 1 exchanged, but they are the same sentence
    assert recall_at(image, text, ks=(1,))[1] == 0.5
    assert recall_at(image, text, groups_of(["a", "a", "b", "c"]), ks=(1,))[1] == 1.0


def test_spearman_oracle():
    z = torch.tensor([3.0, 2, 1, 0, 0])
    assert spearman(z, torch.tensor([5.0, 4, 2, 0, 0])).item() == pytest.approx(1)
    assert spearman(z, torch.tensor([0.0, 0, 0, 1, 2])).item() == pytest.approx(-0.860309, abs=1e-6)
    assert spearman(torch.zeros(5), torch.arange(5.0)).isnan()  # a constant has no rank


def test_spearman_by_hand_with_ties():
    assert spearman(torch.tensor([1, 2, 3, 4]), torch.tensor([10, 20, 30, 25])).item() == pytest.approx(1 - 12 / 60)
    assert spearman(torch.tensor([1, 2, 3]), torch.tensor([5, 5, 9])).item() == pytest.approx(0.5 * 3**0.5)


def test_spearman_of_columns_is_that_of_each_pair():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 9, (40, 3), generator=g), torch.randn(40, 2, generator=g)
    table = spearman(x, y)
    assert table.shape == (3, 2) and spearman(x, y[:, 0]).shape == (3,)
    for i in range(3):
        for j in range(2):
            assert table[i, j] == spearman(x[:, i], y[:, j])
    torch.testing.assert_close(spearman(y, y), torch.corrcoef(centred_ranks(y).T))


def test_wilson_by_hand():
    assert wilson(0, 10) == pytest.approx((0, 0.27754), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-5)
    assert all(v != v for v in wilson(0, 0))
    for n in range(1, 2001):
        assert wilson(0, n)[0] == 0 < wilson(0, n)[1] and wilson(n, n)[0] < 1 == wilson(n, n)[1], n


def test_balanced_interval_covers_and_shrinks():
    low, high = balanced_interval(torch.tensor([8.0, 1, 0]), torch.tensor([10, 10, 0]))
    assert low < 0.45 < high and high - low > 0.1
    more = balanced_interval(torch.tensor([800.0, 100, 0]), torch.tensor([1000, 1000, 0]))
    assert more[1] - more[0] == pytest.approx((high - low) / 10, rel=0.35)
