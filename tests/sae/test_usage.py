import copy

import torch

from mmsae.sae import UsageTracker
from mmsae.sae import usage as usage_module
from mmsae.types import Codes
from tests.helpers.waits import NoWaits


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


def test_dead_ids_are_those_of_dead_also_where_a_device_works_ahead(monkeypatch):
    """The path of a device, run on the CPU: the number is sent ahead and nothing else is read."""
    monkeypatch.setattr(usage_module, "waits", lambda t: True)
    g = torch.Generator().manual_seed(0)
    usage = UsageTracker(20, ("image", "text"))

    def step(n=8):
        return {m: Codes(torch.ones(n, 2), torch.randint(0, 20, (n, 2), generator=g), 20) for m in usage.modalities}

    assert usage.dead_ids(9).tolist() == []
    for _ in range(12):
        batch = step()
        with NoWaits():
            usage.update(batch)
            ids = usage.dead_ids(9)
        assert ids.tolist() == usage.dead(9).nonzero()[:, 0].tolist()
    assert 0 < len(ids) < 20
    usage.since[:, ids[:1]] = 0  # whoever changes the counts, as resampling does
    assert usage.dead_ids(9).tolist() == ids[1:].tolist()
    assert copy.deepcopy(usage).dead_ids(9).tolist() == ids[1:].tolist()
    other = UsageTracker(20, ("image", "text"))
    other.dead_ids(9)
    other.load_state_dict(usage.state_dict())
    assert other.dead_ids(9).tolist() == ids[1:].tolist()


def test_one_modality_of_two_is_counted_without_waiting():
    usage = UsageTracker(6, ("image", "text"))
    batch = codes([[(0, 1), (5, 2)]] * 4, m="text")
    with NoWaits():
        usage.update({"text": batch})
    assert usage.tokens.tolist() == [0, 4] and usage.since[1].tolist() == [0, 4, 4, 4, 4, 0]
