import torch

from mmsae.sae import UsageTracker
from mmsae.types import Codes


def codes(rows, d_sae=6, m="image"):
    idx = torch.tensor([[i for i, _ in r] for r in rows])
    return Codes(torch.tensor([[float(v) for _, v in r] for r in rows]), idx, d_sae, m)


def test_hand_computed_counts():
    usage = UsageTracker(6, ("image", "text"))
    usage.update({"image": codes([[(0, 1), (1, -1)], [(0, -1), (2, 0)]]), "text": codes([[(5, 1), (0, 0)]])})
    assert usage.counts.tolist() == [[2, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]  # +1 and -1 both fire, a picked 0 does not
    assert usage.since.tolist() == [[0, 0, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0]]
    usage.update({"image": codes([[(2, 3), (3, 1)]] * 3)})
    assert usage.since[0].tolist() == [3, 3, 0, 0, 5, 5] and usage.tokens.tolist() == [5, 1]
    assert usage.dead(3, "image").tolist() == [True, True, False, False, True, True]
    assert usage.dead(1).tolist() == [True, True, False, False, True, False]  # dead everywhere
    assert usage.density("image")[0] == 2 / 5
    usage.reset()
    assert usage.counts.sum() == 0 and usage.since.sum() > 0


def test_dense_and_sparse_codes_count_equally():
    torch.manual_seed(0)
    idx = torch.stack([torch.randperm(20)[:4] for _ in range(30)])
    sparse = Codes(torch.randn(30, 4).relu(), idx, 20)
    dense = Codes(sparse.to_dense(), None, 20)
    a, b = UsageTracker(20, ("x",)), UsageTracker(20, ("x",))
    a.update({"x": sparse})
    b.update({"x": dense})
    assert torch.equal(a.counts, b.counts) and torch.equal(a.since, b.since) and a.since.dtype == torch.int64
