import torch

from mmsae import SAE
from mmsae.sae import Dictionary, EnergyTopK, LossContext, NormMatch, PreCodes, ReLU, SelectContext
from tests.helpers.recipes import batch


def rows_of(x, atoms, bias=None):
    dictionary = Dictionary(norm="free", bias=bias is not None)
    dictionary.build(atoms.shape[1], len(atoms))
    dictionary.weight.data = atoms
    if bias is not None:
        dictionary.bias.data = bias
    return SelectContext("image", dictionary, x)


def codes(u, rows, training=True):
    values, indices = EnergyTopK().train(training)(PreCodes(u, torch.eye(u.shape[1]), None), rows)
    return values if indices is None else torch.zeros_like(u).scatter(1, indices, values)


def test_the_prefix_is_the_best_of_all():
    torch.manual_seed(0)
    u, x, atoms, bias = torch.randn(60, 30), torch.randn(60, 8), torch.randn(30, 8), torch.randn(8) / 3
    for size in (0.5, 3.0, 8.0):
        z = codes(u, rows := rows_of(size * x, atoms, bias))
        norms, target = atoms.norm(dim=1), (size * x - bias).norm(dim=1)
        energy = (u.relu() * norms).square()
        ordered = energy.sort(dim=1, descending=True).values
        gaps = (ordered.cumsum(1).sqrt() - target[:, None]).abs()
        torch.testing.assert_close((z * norms).norm(dim=1).sub(target).abs(), gaps.amin(1), atol=1e-5, rtol=1e-5)
        assert torch.equal(z[z > 0], u[z > 0])
        dropped = torch.where((z == 0) & (u > 0), energy, 0).amax(1)
        assert (torch.where(z > 0, energy, torch.inf).amin(1) >= dropped).all()
        assert torch.equal(codes(u, rows, training=False), z)


def test_scale_of_a_row_does_not_change_its_k_and_each_row_stands_alone():
    torch.manual_seed(1)
    u, x, atoms = torch.randn(40, 30).relu(), 3 * torch.randn(40, 8), torch.randn(30, 8)
    z = codes(u, rows_of(x, atoms))
    torch.testing.assert_close(codes(4 * u, rows_of(4 * x, atoms)), 4 * z)
    assert torch.equal(codes(u[7:8], rows_of(x[7:8], atoms)), z[7:8])
    assert (z != 0).any(1).all() and (z != 0).sum(1).unique().numel() > 5


def test_gradients_reach_what_is_kept_alone():
    u = torch.rand(5, 12).requires_grad_()
    z = codes(u, rows_of(torch.ones(5, 12) * 0.3, torch.eye(12)))
    z.sum().backward()
    assert torch.equal(u.grad, (z != 0).float())


def test_with_a_target_out_of_reach_it_is_relu():
    u, huge = torch.randn(20, 30), torch.full((20, 8), 1e6)
    relu, _ = ReLU()(PreCodes(u, torch.eye(30), None), rows_of(huge, torch.randn(30, 8)))
    assert torch.equal(codes(u, rows_of(huge, torch.randn(30, 8))), relu)


def test_the_loss_is_the_gap_of_the_norms():
    torch.manual_seed(2)
    sae = SAE(16, 48, modalities=["image"], selector=EnergyTopK())
    sae.fit_normaliser(batch(sae, 200, seed=5).x)
    out, context = sae(batch(sae, 50)), LossContext(sae)
    z, x = out["image"].codes.to_dense(), out["image"].target
    unit, bias = sae.normaliser.variance("image"), sae.dictionary("image").bias
    for subtract, target in ((True, x - bias), (False, x)):
        want = 0.5 * (z.norm(dim=1) - target.norm(dim=1)).square().mean() / unit
        torch.testing.assert_close(NormMatch(0.5, subtract)(out, context), want)
    empty = out["image"]._replace(codes=out["image"].codes._replace(values=torch.zeros(50, 48, requires_grad=True)))
    NormMatch()({"image": empty}, context).backward()
    assert torch.isfinite(empty.codes.values.grad).all()
