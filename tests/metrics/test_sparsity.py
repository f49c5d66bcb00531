import pytest
import torch

from mmsae.metrics.sparsity import Sparsity, sparsity
from mmsae.types import Codes


def codes(n=60, d=12, k=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    idx = torch.rand(n, d, generator=g)[:, : d - 2].argsort(1)[:, :k]  # the last two latents never fire
    val = torch.rand(n, k, generator=g) + 0.1
    val[::4, -1] = 0  # selected but not fired
    return Codes(val, idx, d)


@pytest.mark.parametrize("dense", [False, True])
def test_equals_naive_counts(dense):
    c = codes()
    z = c.to_dense()
    s = sparsity(Codes(z, None, 12) if dense else c, hub=0.3)
    on = z != 0
    assert s.l0.item() == pytest.approx(on.sum(1).double().mean().item())
    torch.testing.assert_close(s.density, on.double().mean(0))
    torch.testing.assert_close(s.energy, z.double().square().mean(0))
    assert s.dead_fraction.item() == pytest.approx(2 / 12)
    assert s.hub_fraction.item() == pytest.approx((on.double().mean(0) > 0.3).double().mean().item())
    assert int(s.rows) == 60


def test_streaming_and_merging_equal_one_pass_and_states_are_integers():
    c = codes()
    one, two = Sparsity(12), Sparsity(12)
    one.update(c.rows(slice(0, 7)))
    one.update(c.rows(slice(7, 20)))
    two.update(c.rows(slice(20, 60)))
    one.merge_state(two)
    assert one.fired.dtype == torch.long
    for a, b in zip(one.compute(), sparsity(c), strict=True):
        torch.testing.assert_close(a, b, check_dtype=False)
