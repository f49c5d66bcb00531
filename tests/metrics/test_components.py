import torch

from mmsae.metrics.components import Components, Moments, principal
from mmsae.metrics.reconstruction import fvu


def test_principal_axes_whiten_and_leave_empty_directions_out():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(400, 3, generator=g) @ torch.diag(torch.tensor([3.0, 1, 0.1]))
    x = torch.cat([x, x[:, :1]], 1) + 5  # a fourth channel that says nothing new
    mean, axes, spread = principal(x)
    assert axes.shape == (4, 3) and (spread[:-1] >= spread[1:]).all()
    white = (x.double() - mean) @ axes / spread
    torch.testing.assert_close(white.T @ white / 399, torch.eye(3, dtype=torch.float64))


def test_moments_are_those_of_all_rows_and_components_decode():
    x, moments = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + 100, Moments()
    for part in x.split(77):
        moments.add(part)
    mean, covariance = moments.of()
    torch.testing.assert_close(mean, x.double().mean(0))
    torch.testing.assert_close(covariance, x.double().T.cov(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(principal(moments)[2], principal(x)[2], rtol=1e-6, atol=0)
    few, every = Components.leading(moments, 1.6), Components.leading(x, 99)
    assert few.axes.shape == (6, 2) and every.axes.shape == (6, 6)
    torch.testing.assert_close(every.decode(every.encode(x)), x, rtol=1e-5, atol=0)
    assert 0.3 < fvu(few.decode(few.encode(x)), x) < 0.8
