import pytest
import torch

from mmsae.metrics import concept_report
from mmsae.metrics.concepts.concepts import _tables, f1_table, match_concepts, score_concepts, thresholds
from mmsae.types import Codes, InputError


def f1(fired, truth):
    tp = (fired & truth).sum().item()
    return 2 * tp / max(fired.sum().item() + truth.sum().item(), 1)


def brute_auc(score, truth):
    d = score[truth][:, None].double() - score[~truth][None].double()
    return ((d > 0).double() + 0.5 * (d == 0).double()).mean().item()


def naive_match(z, truth):
    """Best (F1, threshold) and AUC per (concept, latent), by loops."""
    cs, ls = truth.shape[1], z.shape[1]
    best, thr, auc = torch.zeros(cs, ls), torch.zeros(cs, ls), torch.zeros(cs, ls)
    for j in range(ls):
        pos = z[:, j][z[:, j] > 0]
        cand = [0.0, *([torch.quantile(pos, q).item() for q in (0.25, 0.5, 0.75)] if len(pos) else [])]
        for c in range(cs):
            auc[c, j] = brute_auc(z[:, j], truth[:, c])
            for t in cand:
                if (v := f1(z[:, j] > t, truth[:, c])) > best[c, j]:
                    best[c, j], thr[c, j] = v, t
    return best, thr, auc


def world(n=120, d=9, c=3, seed=0, flip=0.1):
    g = torch.Generator().manual_seed(seed)
    truth = torch.rand(n, c, generator=g) > 0.6
    codes = {}
    for m in ("image", "text"):
        z = torch.rand(n, d, generator=g) * (torch.rand(n, d, generator=g) < 0.2)
        seen = truth ^ (torch.rand(n, c, generator=g) < flip)
        z[:, 1 : 2 * c : 2] = seen * (0.5 + torch.rand(n, c, generator=g))
        z[:, -1] = 0
        v, i = z.topk(6, dim=1)
        codes[m] = Codes(v, i, d)
    return codes, truth


def test_thresholds_are_zero_and_quartiles_of_the_positives():
    z = torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0], [5, 0]])
    assert thresholds(z).T.tolist() == [[0, 1.75, 2.5, 3.5], [0, 0, 0, 0]]


def test_f1_table_equals_loops():
    codes, truth = world()
    z = codes["image"].to_dense()
    at = thresholds(z)
    table = f1_table(z, truth, at)
    for t in range(4):
        for c in range(3):
            for j in range(9):
                assert table[t, c, j].item() == pytest.approx(f1(z[:, j] > at[t, j], truth[:, c]), abs=1e-6)


@pytest.mark.parametrize("chunk", [2, 100])
def test_match_and_score_equal_loops(chunk):
    train, truth = world(seed=0)
    test, test_truth = world(seed=1)
    match = match_concepts(train, truth, chunk=chunk)
    got_f1, got_auc = score_concepts(match, test, test_truth)
    tables = {m: naive_match(train[m].to_dense(), truth) for m in train}
    for c in range(3):
        for m in ("image", "text"):
            j = tables[m][0][c].argmax()
            assert int(match.f1_latent[m][c]) == j
            z = test[m].to_dense()
            want = f1(z[:, j] > tables[m][1][c, j], test_truth[:, c])
            assert got_f1[m][c].item() == pytest.approx(want)
            assert got_auc[m][c].item() == pytest.approx(brute_auc(z[:, tables[m][2][c].argmax()], test_truth[:, c]))
        j = torch.minimum(tables["image"][0][c], tables["text"][0][c]).argmax()
        both = [f1(test[m].to_dense()[:, j] > tables[m][1][c, j], test_truth[:, c]) for m in test]
        assert got_f1["same"][c].item() == pytest.approx(min(both))
        j = torch.minimum(tables["image"][2][c], tables["text"][2][c]).argmax()
        both = [brute_auc(test[m].to_dense()[:, j], test_truth[:, c]) for m in test]
        assert got_auc["same"][c].item() == pytest.approx(min(both))


def test_sparse_codes_are_matched_as_their_matrix_with_ties_and_signs(monkeypatch):
    g = torch.Generator().manual_seed(3)
    n, d, k = 150, 24, 5
    indices = torch.rand(n, d - 2, generator=g).topk(k).indices + 1  # the first and the last never fire
    values = torch.randint(-2, 5, (n, k), generator=g) / 4  # ties, signs, and what is selected and 0
    values[:20, 0], indices[:20] = 1.0, torch.arange(1, k + 1)
    codes = Codes(values, indices, d)
    truth = torch.rand(n, 4, generator=g) < 0.3
    truth[:, 3] = True  # no AUC
    matrix = codes.to_dense()
    monkeypatch.setattr(Codes, "to_dense", lambda self: pytest.fail("a matrix of codes is made"))
    monkeypatch.setattr(Codes, "gather", lambda self, ids: pytest.fail("columns of a matrix are made"))
    for chunk in (7, 100):
        got, want = _tables(codes, truth, chunk), _tables(Codes(matrix.double(), None, d), truth, 100)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)
    f1_of, _, auc_of = got
    best, _, auc = naive_match(matrix, truth[:, :3])
    torch.testing.assert_close(f1_of[:3], best, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(auc_of[:3].float(), auc, rtol=1e-6, atol=1e-6)
    empty = _tables(Codes(torch.zeros(n, k), indices, d), truth, 100)
    assert not empty[0].any() and not empty[1].any() and (empty[2][:3] == 0.5).all()


def test_one_latent_may_serve_two_concepts():
    v = torch.tensor([[1.0], [1], [0], [0]])
    c = Codes(v, torch.zeros(4, 1, dtype=torch.long), 3)
    truth = torch.tensor([[1, 1], [1, 1], [0, 0], [0, 0]]).bool()
    r = concept_report({"image": c, "text": c}, truth, {"image": c, "text": c}, truth, ["a", "b"], ["g", "h"])
    assert r["concept_f1"] == {"image": 1, "text": 1, "same": 1} and r["concept_auc"]["same"] == 1


def test_report_averages_by_group_and_finds_planted_latents():
    train, truth = world(seed=0)
    test, test_truth = world(seed=1)
    r = concept_report(train, truth, test, test_truth, ["red", "blue", "disc"], ["colour", "colour", "shape"])
    by = r["concept_f1_by_group"]
    per = {c["name"]: c for c in r["concepts"]}
    assert [c["latent"]["same"] for c in r["concepts"]] == [1, 3, 5]
    for side in ("image", "text", "same"):
        assert by[side]["colour"] == pytest.approx((per["red"]["f1"][side] + per["blue"]["f1"][side]) / 2)
        assert r["concept_f1"][side] == pytest.approx(sum(c["f1"][side] for c in r["concepts"]) / 3)
    assert 0.7 < r["concept_f1"]["same"] <= min(r["concept_f1"]["image"], r["concept_f1"]["text"]) < 1


def test_absent_concepts_are_left_out_of_the_mean():
    train, truth = world()
    lacking = truth.clone()
    lacking[:, 0] = False
    r = concept_report(train, truth, train, lacking, ["a", "b", "c"], ["x", "y", "y"])
    assert r["concepts"][0]["f1"]["image"] != r["concepts"][0]["f1"]["image"]  # NaN
    assert r["concept_f1"]["image"] == pytest.approx(r["concept_f1_by_group"]["image"]["y"])


def test_choice_is_made_on_training_samples_only():
    """A latent that is perfect on the held-out samples and useless on training ones must not be chosen."""
    truth = torch.tensor([[1], [1], [0], [0]]).bool()
    train = Codes(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 0]]), None, 2)
    test = Codes(torch.tensor([[0.0, 1], [0, 1], [1, 0], [1, 0]]), None, 2)
    sides = ({"image": train, "text": train}, truth, {"image": test, "text": test}, truth)
    assert concept_report(*sides, ["a"], ["g"])["concept_f1"]["image"] == 0


def test_wrong_columns_are_named():
    codes, truth = world()
    with pytest.raises(InputError, match="2 concept names and 3 groups for truth of 3"):
        concept_report(codes, truth, codes, truth, ["a", "b"], ["x", "y", "z"])
