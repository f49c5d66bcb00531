import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from mmsae import SAE, InputError
from mmsae.metrics.pairs.bridge import stability
from mmsae.sae import ArchetypalDictionary, Dictionary, Normaliser, PerModalityEncoder, Reconstruction, TopK
from tests.helpers.recipes import Run, batch


def started(dictionary, seed=0, d_sae=48, **kwargs):
    torch.manual_seed(seed)
    sae = SAE(
        16,
        d_sae,
        modalities=["image"],
        normaliser=Normaliser(centre=True, scale="rms"),
        selector=TopK(4),
        dictionaries={"shared": dictionary},
        **kwargs,
    )
    sae.fit_normaliser(batch(sae, 512, seed=9).x)
    return sae


def outside(sae):
    """Distance of every atom, the scale taken off, from the hull of the points."""
    d = sae.dictionary("image")
    points = d.points.double()
    # minimise |C' w - a|^2 + big (sum w - 1)^2 over w >= 0
    system = torch.cat([points.T, torch.full((1, len(points)), 1e3, dtype=torch.float64)]).numpy()
    atoms = (d.rows() / d.scale.exp()).detach().double()
    weights = np.stack([nnls(system, torch.cat([a, a.new_tensor([1e3])]).numpy())[0] for a in atoms])
    return (torch.from_numpy(weights) @ points - atoms).norm(dim=1)


def test_atoms_start_as_points_and_the_encoder_as_atoms():
    for encoder in (None, PerModalityEncoder):
        kwargs = {} if encoder is None else {"encoder": PerModalityEncoder(SAE().encoder)}
        sae = started(ArchetypalDictionary(points=64), **kwargs)
        d = sae.dictionary("image")
        assert torch.equal(d.rows(), d.points[:48])
        weight = (sae.encoder if encoder is None else sae.encoder.encoders["image"]).weight
        torch.testing.assert_close(weight, torch.nn.functional.normalize(d.points[:48]))
        assert d.points.norm(dim=1).max() < 3 and outside(sae).max() < 1e-5


@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_the_constraints_hold_after_steps(delta):
    sae = started(ArchetypalDictionary(delta=delta, learn_scale=delta > 0))
    points = sae.dictionary("image").points.clone()
    Run(sae, [Reconstruction()], lr=3e-2).go(30)
    d = sae.dictionary("image")
    assert torch.equal(d.points, points) and (d.mix >= 0).all()
    torch.testing.assert_close(d.mix.sum(1), torch.ones(48), atol=1e-6, rtol=0)
    assert (d.relax.norm(dim=1) <= delta * (1 + 1e-6)).all()
    assert (d.scale != 0) == (delta > 0) and (delta == 0 or d.relax.norm(dim=1).max() > 0.9 * delta)
    far = outside(sae)
    assert far.max() <= delta + 1e-5 and (delta == 0 or far.max() > 0.1 * delta)


def test_an_atom_that_lost_every_point_keeps_its_best():
    d = ArchetypalDictionary(points=4)
    d.build(3, 2)
    with torch.no_grad():
        d.mix.copy_(torch.tensor([[-3.0, -1.0, -2.0, -9.0], [1.0, 3.0, -1.0, 0.0]]))
        d.relax[0] = 7.0
    d.after_step_()
    assert d.mix.tolist() == [[0, 1, 0, 0], [0.25, 0.75, 0, 0]]
    torch.testing.assert_close(d.relax.norm(dim=1), torch.tensor([1.0, 0.0]))


def test_atoms_follow_their_parts_without_a_stale_copy():
    sae, other = started(ArchetypalDictionary()), started(ArchetypalDictionary(), seed=1)
    Run(other, [Reconstruction()]).go(3)
    sae.eval()
    before = sae.dictionary("image").rows()
    sae.load_state_dict(other.state_dict())
    rows = sae.dictionary("image").rows()
    assert torch.equal(rows, other.dictionary("image").rows()) and not torch.equal(rows, before)
    assert sae.eval() is sae


def test_seeds_agree_on_atoms_as_they_do_not_otherwise():
    def two(make):
        saes = [started(make(), seed=seed) for seed in (0, 1)]
        for order, sae in enumerate(saes):
            run = Run(sae, [Reconstruction()], lr=1e-2)
            run.step = 1000 * order  # other batches
            run.go(150)
        return stability(*(sae.dictionary("image").rows().detach() for sae in saes))["stability"]

    archetypal, plain = two(ArchetypalDictionary), two(Dictionary)
    assert archetypal > 0.85 > plain + 0.15


def test_random_dictionaries_have_a_level_of_stability():
    torch.manual_seed(0)
    a, b = torch.randn(2, 80, 64).unbind()
    assert stability(a, a[torch.randperm(80)])["stability"] == pytest.approx(1.0)
    assert stability(a, b)["stability"] == pytest.approx(0.27, abs=0.02)


def test_a_negative_distance_is_refused():
    with pytest.raises(InputError, match="delta must be at least 0, not -1"):
        ArchetypalDictionary(delta=-1.0)
