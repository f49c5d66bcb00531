import pytest
import torch

from mmsae.metrics.concepts.uniqueness import coherence, top_rows, uniqueness
from mmsae.types import Codes


def jaccard_loop(rows):
    sets = [set(r[r >= 0].tolist()) for r in rows]
    sets = [s for s in sets if s]
    values = [len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    return sum(values) / len(values), sum(v > 0.5 for v in values) / len(values)


def test_jaccard_equals_the_loop():
    g = torch.Generator().manual_seed(0)
    rows = torch.rand(12, 30, generator=g).argsort(1)[:, :6]
    rows[3, 4:] = -1
    rows[5] = -1
    rows[8] = rows[7]
    rows[9, 1] = rows[9, 0]  # a sample counts once
    got = uniqueness(rows, chunk=5)
    mean, close = jaccard_loop(rows)
    assert got["jaccard"] == pytest.approx(mean, abs=1e-6) and got["close"] == pytest.approx(close)
    assert got["features"] == 11 and close > 0
    assert uniqueness(rows[:1])["jaccard"] != uniqueness(rows[:1])["jaccard"]  # NaN: nothing to compare


def test_top_rows_of_codes_and_of_channels():
    x = torch.tensor([[3.0, 0, -1], [1, 0, -2], [3, 2, -3], [2, 0, -4]])
    want = [[0, 2, 3], [2, -1, -1], [-1, -1, -1]]
    assert top_rows(x, 3).tolist() == want
    v, i = x.clamp(min=0).topk(2, dim=1)
    assert top_rows(Codes(v, i, 3), 3, chunk=2).tolist() == want
    v, i = x.abs().topk(2, dim=1)
    signed = Codes(x.gather(1, i), i, 3)
    assert top_rows(signed, 2).tolist() == [[0, 2], [-1, -1], [3, 2]]  # of codes, both poles
    assert top_rows(x, 6)[0].tolist() == [0, 2, 3, 1, -1, -1]


def test_top_rows_of_sparse_codes_are_those_of_a_sort_of_every_latent(monkeypatch):
    g = torch.Generator().manual_seed(1)
    values = torch.randint(-3, 4, (80, 4), generator=g).float()  # ties, signs, zeros
    codes = Codes(values, torch.rand(80, 25, generator=g).topk(4).indices, 26)
    z = codes.to_dense().abs().T.tolist()
    want = [[i for i in sorted(range(80), key=lambda i: (-v[i], i)) if v[i] > 0][:6] for v in z]
    monkeypatch.setattr(Codes, "gather", lambda self, ids: pytest.fail("columns of a matrix are made"))
    assert top_rows(codes, 6).tolist() == [rows + [-1] * (6 - len(rows)) for rows in want]
    assert max(map(len, want)) == 6 and want[25] == []


def test_coherence_is_the_mean_cosine_of_pairs():
    g = torch.Generator().manual_seed(2)
    e = torch.randn(10, 4, generator=g)
    rows = torch.tensor([[0, 3, 5], [2, -1, -1], [1, 9, -1]])
    got = coherence(rows, e)
    cos = torch.nn.functional.normalize(e.double(), dim=1)
    cos = cos @ cos.T
    assert got[0].item() == pytest.approx(((cos[0, 3] + cos[0, 5] + cos[3, 5]) / 3).item(), abs=1e-12)
    assert got[1].isnan() and got[2].item() == pytest.approx(cos[1, 9].item(), abs=1e-12)
