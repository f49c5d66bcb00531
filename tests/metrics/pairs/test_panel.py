import numpy as np
import pytest
import torch

from mmsae.metrics.pairs import panel as panel_module
from mmsae.metrics.pairs.correlation import cross_correlation
from mmsae.metrics.pairs.panel import CorrelationPanel
from tests.helpers.pairs import as_codes, random_codes


def panel_of(z, w, sparse=True, step=16):
    metric = CorrelationPanel(z.shape[1])
    table = metric.cross.data_ptr()
    for lo in range(0, len(z), step):
        metric.update(as_codes(z[lo : lo + step], sparse), as_codes(w[lo : lo + step], sparse))
    assert metric.cross.data_ptr() == table  # d_sae^2 numbers, which no update copies
    return metric.compute()


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_it_is_numpys_correlation_of_all_latents_with_all(sparse):
    z, w = random_codes(100, 12, 3, 0), random_codes(100, 12, 3, 1)
    w[:, :6] += z[:, 6:]
    want = np.corrcoef(z.double().numpy(), w.double().numpy(), rowvar=False)[:12, 12:]
    got = panel_of(z, w, sparse)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-9)
    torch.testing.assert_close(got.diagonal(), cross_correlation(as_codes(z), as_codes(w)))


def test_long_batches_are_taken_in_parts(monkeypatch):
    z, w = random_codes(50, 12, 3, 0), random_codes(50, 12, 3, 1)
    whole = panel_of(z, w, step=50)
    monkeypatch.setattr(panel_module, "_ENTRIES", 144 * 7)
    torch.testing.assert_close(panel_of(z, w, step=50), whole, rtol=1e-12, atol=1e-12)


def test_latents_that_never_vary_have_no_correlation():
    z, w = random_codes(60, 6, 2, 0), random_codes(60, 6, 2, 1)
    z[:, 2], w[:, 4] = 0.0, 1.0
    got = panel_of(z, w)
    nan = torch.zeros(6, 6, dtype=torch.bool)
    nan[2], nan[:, 4] = True, True
    assert torch.equal(got.isnan(), nan)
