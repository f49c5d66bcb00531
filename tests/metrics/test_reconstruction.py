import pytest
import torch

from mmsae.metrics import FVU, ReconstructionMetrics, fvu
from mmsae.metrics.reconstruction import FlaggedError
from mmsae.types import ROLES


def data(n=200, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) * torch.arange(1, d + 1) + 5
    return x + 0.3 * torch.randn(n, d, generator=g), x


def naive(x_hat, x):
    x_hat, x = x_hat.double(), x.double()
    return (((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()).item()


def test_mean_only_decoder_scores_one_and_perfect_zero():
    _, x = data()
    assert fvu(x.double().mean(0).expand_as(x), x.double()) == pytest.approx(1, abs=1e-12)
    assert fvu(x, x) == 0


def test_equals_naive_formula_far_from_the_origin():
    x_hat, x = data()
    assert fvu(x_hat, x) == pytest.approx(naive(x_hat, x), rel=1e-10)
    far = 1000.0  # |mean|^2 is then 1e6 times the variance
    assert fvu((x_hat + far).double(), (x + far).double()) == pytest.approx(naive(x_hat + far, x + far), rel=1e-6)


@pytest.mark.parametrize("sizes", [[200], [1, 199], [7] * 28 + [4], [100, 0, 100]])
def test_invariant_to_batch_split_unlike_the_mean_of_batch_fvus(sizes):
    x_hat, x = data()
    metric = FVU(6)
    for a, b in zip(x_hat.split(sizes), x.split(sizes), strict=True):
        metric.update(a, b)
    assert metric.compute().item() == pytest.approx(naive(x_hat, x), rel=1e-12)


def test_merged_states_equal_one_rank():
    x_hat, x = data()
    one, two = FVU(6), FVU(6)
    one.update(x_hat[:31], x[:31])
    two.update(x_hat[31:], x[31:])
    one.merge_state(two)
    assert one.compute().item() == pytest.approx(naive(x_hat, x), rel=1e-12)


def test_joint_is_pooled_about_each_modalitys_own_mean():
    (ah, a), (bh, b) = data(50, 3, 1), data(80, 5, 2)
    b, bh = b + 40, bh + 40
    metric = ReconstructionMetrics({"image": 3, "text": 5})
    metric.update({"image": ah, "text": bh}, {"image": a, "text": b})
    out = metric.compute()
    sse = ((a - ah) ** 2).sum() + ((b - bh) ** 2).sum()
    sst = ((a - a.mean(0)) ** 2).sum() + ((b - b.mean(0)) ** 2).sum()
    assert out["fvu/joint"].item() == pytest.approx((sse / sst).item(), rel=1e-5)
    assert out["fvu/image"].item() == pytest.approx(naive(ah, a), rel=1e-10)
    assert out["explained_variance/text"].item() == pytest.approx(1 - naive(bh, b), rel=1e-10)
    assert out["cosine/text"].item() == pytest.approx(torch.cosine_similarity(bh, b).mean().item(), rel=1e-5)


def test_half_precision_rows_are_summed_in_double():
    x = (torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    assert fvu(torch.zeros_like(x), x) == pytest.approx(naive(torch.zeros_like(x), x), rel=1e-9)


def test_unseen_modality_is_left_out_and_empty_is_nan():
    metric = ReconstructionMetrics({"image": 2, "text": 2})
    metric.update({"image": torch.ones(3, 2)}, {"image": torch.eye(3, 2)})
    assert "fvu/text" not in metric.compute() and "fvu/image" in metric.compute()
    assert FVU(2).compute().isnan()


def test_errors_of_flags_are_masked_errors():
    g = torch.Generator().manual_seed(0)
    x, x_hat = {}, {}
    for m, d in (("image", 3), ("text", 5)):
        x[m], x_hat[m] = torch.randn(40, d, generator=g), torch.randn(40, d, generator=g)
    role = {"image": torch.full((40,), 5), "text": torch.randint(1, 5, (40,), generator=g)}
    special = {"image": torch.zeros(40, dtype=torch.bool), "text": role["text"] < 3}
    metric = FlaggedError()
    for part in (slice(0, 7), slice(7, 40)):
        for m in x:
            metric.update(x_hat[m][part], x[m][part], special[m][part], role[m][part].to(torch.uint8))
    want = {"special": {m: s for m, s in special.items()}}
    want |= {f"role/{name}": {m: r == i for m, r in role.items()} for i, name in enumerate(ROLES)}
    report = metric.compute()
    assert set(report) == {f"mse/{n}" for n, on in want.items() if any(o.any() for o in on.values())}
    for name, on in want.items():
        if f"mse/{name}" in report:
            squares = torch.cat([(x[m] - x_hat[m])[on[m]].double().square().flatten() for m in x])
            assert float(report[f"mse/{name}"]) == pytest.approx(float(squares.mean()))
    only = FlaggedError()
    only.update(x_hat["text"], x["text"], special["text"])
    assert set(only.compute()) == {"mse/special"}
