import pytest
import torch

from mmsae.metrics import TopN, text_keys, top_evidence
from mmsae.metrics.concepts.evidence import pack_uids, unpack_uids
from mmsae.types import Codes, InputError


def uid(i):
    return f"{i * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def sparse_codes(n=90, d=7, k=3, seed=0, levels=5):
    """Few distinct values, so that ties are everywhere; the last latent is dead."""
    g = torch.Generator().manual_seed(seed)
    idx = torch.rand(n, d - 1, generator=g).argsort(1)[:, :k]
    return Codes(torch.randint(0, levels, (n, k), generator=g) / levels, idx, d)


def naive_top(z, uids, j, n, keys=None):
    """Of each key the best (value, then smallest uid); of those the n best; zeros dropped."""
    best = {}
    for i in range(len(z)):
        v = z[i, j].item()
        key = uids[i] if keys is None else keys[i]
        if v > 0:
            best[key] = min(best.get(key, (0, "~")), (-v, uids[i]))
    return [(u, pytest.approx(-v)) for v, u in sorted(best.values())[:n]]


def same_table(a, b):
    assert a.rows == b.rows and torch.equal(a.values, b.values) and torch.equal(a.n_fired, b.n_fired)
    assert all(a.top(j) == b.top(j) for j in range(len(a.values)))


def test_uids_pack_in_order_and_unpack():
    uids = [uid(i) for i in range(50)] + ["0" * 32, "f" * 32, "8" + "0" * 31, "7" + "f" * 31]
    packed = pack_uids(uids)
    assert unpack_uids(packed) == uids
    assert sorted(range(len(uids)), key=lambda i: uids[i]) == sorted(range(len(uids)), key=lambda i: packed[i].tolist())
    assert pack_uids([]).shape == (0, 2)


@pytest.mark.parametrize("bad", ["x" * 32, "ab", "0" * 31, "0x" + "0" * 30])
def test_other_uids_are_refused_by_name(bad):
    with pytest.raises(InputError, match=bad):
        pack_uids([uid(1), bad])


@pytest.mark.parametrize("n", [1, 4, 200])
@pytest.mark.parametrize("keyed", [False, True])
def test_equals_sorting_everything(n, keyed):
    c = sparse_codes()
    uids = [uid(i % 60) for i in range(90)]  # some samples have two rows
    captions = [f"caption {i % 11}" for i in range(90)] if keyed else None
    table = top_evidence(c, uids, n, None if captions is None else text_keys(captions), chunk=13)
    z = c.to_dense()
    for j in range(7):
        assert table.top(j) == naive_top(z, uids, j, n, captions)
    assert table.top(6) == []
    assert torch.equal(table.n_fired, (z != 0).sum(0))
    want = z.double().sum(0) / (z != 0).sum(0).clamp(min=1)
    torch.testing.assert_close(table.mean_active, want, atol=1e-6, rtol=1e-6)


def test_independent_of_batches_and_order():
    c, uids = sparse_codes(), [uid(i) for i in range(90)]
    keys = text_keys([f"{i % 17}" for i in range(90)])
    want = top_evidence(c, uids, 5, keys)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    metric = TopN(7, 5)
    for part in order.split([1, 20, 3, 40, 26]):
        metric.update(c.rows(part), [uids[i] for i in part], keys[part])
    same_table(metric.compute(), want)


def test_dense_codes_and_merged_ranks_equal_one_pass():
    c, uids = sparse_codes(), [uid(i) for i in range(90)]
    want = top_evidence(c, uids, 5)
    one, two = TopN(7, 5), TopN(7, 5)
    one.update(c.rows(slice(0, 33)), uids[:33])
    two.update(Codes(c.to_dense()[33:], None, 7), uids[33:])
    one.merge_state(two)
    same_table(one.compute(), want)
    same_table(one.compute(), want)  # computing merges a copy


def test_state_does_not_grow_with_samples():
    metric = TopN(7, 5)
    c = sparse_codes()
    size = lambda: sum(getattr(metric, s).numel() for s in metric._defaults)  # noqa: E731
    before = size()
    for i in range(4):
        metric.update(c, [uid(90 * i + r) for r in range(90)])
    assert size() == before and metric.compute().rows == 360


def test_rows_in_finds_positions():
    c, uids = sparse_codes(), [uid(i) for i in range(90)]
    table = top_evidence(c, uids, 4)
    rows = table.rows_in(uids)
    assert [uids[i] for i in rows[0] if i >= 0] == [u for u, _ in table.top(0)]
    assert (rows[6] == -1).all() and (table.rows_in(uids[:2]) < 2).all()


def test_wrong_number_of_uids():
    with pytest.raises(InputError, match="1 uids for 90 rows"):
        TopN(7).update(sparse_codes(), [uid(0)])


def test_signed_codes_are_ranked_by_size_and_keep_their_signs():
    z = torch.tensor([[1.0, 0.0], [-3.0, 0.0], [0.0, 0.0], [2.0, 0.0], [-0.5, 0.0]])
    uids = [uid(i) for i in range(5)]
    table = top_evidence(Codes(z, None, 2), uids, 3, chunk=2)
    assert table.top(0) == [(uids[1], -3.0), (uids[3], 2.0), (uids[0], 1.0)] and table.top(1) == []
    assert table.n_fired.tolist() == [4, 0] and table.mean_active.tolist() == [6.5 / 4, 0]
    assert table.rows_in(uids).tolist() == [[1, 3, 0], [-1, -1, -1]]
    a, b = (TopN(2, 3, sync_on_compute=False) for _ in range(2))
    a.update(Codes(z[:2], None, 2), uids[:2])
    b.update(Codes(z[2:], None, 2), uids[2:])
    a.merge(b.part())
    same_table(a.compute(), table)
