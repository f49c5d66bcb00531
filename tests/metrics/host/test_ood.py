"""OOD measures: the oracles of spec/probing.md section 13, the traps of section 12, and scikit-learn."""

import pytest
import torch

from mmsae.metrics.host.ood import OODScores, auroc_interval, ood_metrics, roc
from mmsae.types import InputError

ID, OOD = torch.tensor([0.9, 0.8, 0.7, 0.2]), torch.tensor([0.65, 0.3, 0.25, 0.1])


def test_the_oracle():
    m = ood_metrics(ID, OOD)
    assert m[:5] == pytest.approx((0.8125, 0.25, 0.75, 0.883929, 0.766667), abs=1e-6)
    assert m.n_id == m.n_ood == 4


def test_a_perfect_split():
    assert ood_metrics(ID + 1, OOD)[:5] == (1, 0, 0, 1, 1)


def test_equal_scores_show_no_skill_although_the_trapezoid_says_075():
    m = ood_metrics(torch.zeros(10), torch.zeros(10))
    assert m[:5] == pytest.approx((0.5, 1, 1, 0.75, 0.75))


def test_the_two_fpr95_are_each_other_with_the_classes_exchanged():
    a, b = torch.randn(300, generator=torch.Generator().manual_seed(0)) + 1, torch.linspace(-3, 3, 200)
    assert ood_metrics(a, b).fpr95_ood_positive == ood_metrics(-b, -a).fpr95_id_positive


def test_a_distance_without_its_minus_is_one_minus_auroc():
    assert ood_metrics(-ID, -OOD).auroc == pytest.approx(1 - 0.8125)


def ties(seed=0, n=400):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=g) + 0.7).mul(3).round(), torch.randn(n // 2, generator=g).mul(3).round()


def test_scikit_learn_agrees_on_tied_scores():
    sk = pytest.importorskip("sklearn.metrics")
    a, b = ties()
    y = torch.cat([torch.zeros(len(a)), torch.ones(len(b))]).numpy()
    conf = torch.cat([a, b]).numpy()
    m = ood_metrics(a, b)
    fpr, tpr, _ = sk.roc_curve(y, -conf, drop_intermediate=False)
    assert m.auroc == pytest.approx(sk.auc(fpr, tpr))
    assert m.fpr95_ood_positive == pytest.approx(fpr[(tpr >= 0.95).argmax()])
    f2, t2, _ = sk.roc_curve(1 - y, conf, drop_intermediate=False)
    assert m.fpr95_id_positive == pytest.approx(f2[(t2 >= 0.95).argmax()])
    for name, truth, s in (("aupr_in", 1 - y, conf), ("aupr_out", y, -conf)):
        p, r, _ = sk.precision_recall_curve(truth, s)
        assert getattr(m, name) == pytest.approx(sk.auc(r, p))
    mine = roc(a, b)
    torch.testing.assert_close(mine[0], torch.from_numpy(fpr))
    torch.testing.assert_close(mine[1], torch.from_numpy(tpr))


def test_pytorch_ood_agrees():
    theirs = pytest.importorskip("pytorch_ood.metrics")
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(500, generator=g) + 1, torch.randn(300, generator=g)
    metrics = theirs.OODMetrics()
    metrics.update(-torch.cat([a, b]), torch.cat([torch.zeros(500), -torch.ones(300)]))
    want = metrics.compute()
    m = ood_metrics(a, b)
    assert m.auroc == pytest.approx(want["AUROC"], abs=1e-6)
    assert m.fpr95_ood_positive == pytest.approx(want["FPR95TPR"], abs=1e-6)
    for name in ("in", "out"):
        assert getattr(m, f"aupr_{name}") == pytest.approx(want[f"AUPR-{name.upper()}"], abs=1e-5)


def test_leaving_collinear_points_out_would_move_the_rate():
    """Section 12.2: with ties the first point that reaches the rate can jump."""
    a, b = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 0, -1, -1])
    fpr, tpr = roc(a, b)
    assert tpr.tolist() == [0, 0.5, 1, 1] and fpr.tolist() == [0, 0, 0.75, 1]
    assert ood_metrics(a, b).fpr95_ood_positive == 0.75


def test_the_interval_holds_the_value_and_shrinks():
    a, b = ties()
    low, high = auroc_interval(a, b)
    value = ood_metrics(a, b).auroc
    assert low < value < high
    more = auroc_interval(a.repeat(4), b.repeat(4))
    assert more[1] - more[0] == pytest.approx((high - low) / 2, rel=0.02)
    assert auroc_interval(ID + 1, OOD) == (1, 1)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.tensor([0.1, torch.nan])])
def test_empty_and_nan_scores_are_refused(bad):
    with pytest.raises(InputError, match="OOD has"):
        ood_metrics(ID, bad)


def test_the_stream_is_the_whole_up_to_its_grid():
    g = torch.Generator().manual_seed(2)
    a, b = -torch.rand(1000, generator=g) * 0.2, -torch.rand(700, generator=g) * 0.5
    metric = OODScores(scale=0.1)
    assert metric.compute() is None
    for part in a.split(130):
        metric.update(part, ood=False)
    for part in b.split(111):
        metric.update(part, ood=True)
    assert metric.compute() == pytest.approx(ood_metrics(a, b), abs=2e-3)
    tied = OODScores()
    tied.update(torch.zeros(10), ood=False)
    tied.update(torch.zeros(10), ood=True)
    assert tied.compute()[:5] == pytest.approx((0.5, 1, 1, 0.75, 0.75))
