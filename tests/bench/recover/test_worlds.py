"""The worlds are what they say."""

import pytest
import torch

from mmsae.bench.recover.worlds import WORLDS


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_is_the_sum_of_its_parts(name):
    world = WORLDS[name](3)
    x, codes = world.sample(4000, 7)
    for m, atoms in world.atoms.items():
        torch.testing.assert_close(atoms.norm(dim=1), torch.ones(world.size))
        noise = x[m] - codes @ atoms - world.mean[m]
        assert noise.norm(dim=1).mean() == pytest.approx(world.noise, rel=0.05)
    assert float((codes != 0).sum(1).double().mean()) == pytest.approx(world.l0, rel=0.06)
    assert bool((codes < 0).any()) == world.signed
    again, same = WORLDS[name](3).sample(4000, 7)
    assert torch.equal(codes, same) and all(torch.equal(x[m], again[m]) for m in x)
    assert not torch.equal(WORLDS[name](4).sample(4000, 7)[0]["image"], x["image"])


def test_children_come_with_their_parent_and_alone():
    world = WORLDS["hierarchical"](0)
    on = world.sample(20_000, 1)[1] != 0
    children = [[c for c, p in enumerate(world.parents.tolist()) if p == parent] for parent in range(3)]
    for parent, own in enumerate(children):
        assert len(own) == 3 and (on[:, own].sum(1) <= 1).all()
        assert on[:, parent][on[:, own].any(1)].all()
        assert float(on[on[:, parent]][:, own].double().mean()) == pytest.approx(0.2, abs=0.02)


def test_blocks_are_on_together_and_frequencies_fall():
    on = (WORLDS["correlated"](0).sample(20_000, 1)[1] != 0).double()
    together = float((on[:, 0] * on[:, 1]).mean() / on[:, 0].mean())
    apart = float((on[:, 0] * on[:, 5]).mean() / on[:, 0].mean())
    assert together > 5 * apart
    rate = (WORLDS["heavy_tailed"](0).sample(20_000, 1)[1] != 0).double().mean(0)
    assert rate[0] == pytest.approx(0.5, abs=0.02) and rate[9] / rate[39] == pytest.approx(4, rel=0.25)


def test_the_classifier_reads_weak_atoms_and_its_gradient_is_right():
    world = WORLDS["downstream"](0)
    x, codes = world.sample(64, 1)
    strong = codes.clone()
    strong[:, :16] = 0  # what a reconstruction loses that drops the weak atoms
    atoms = world.atoms["image"]
    assert world.loss(codes @ atoms, codes).mean() < 0.5 * world.loss(strong @ atoms, codes).mean()
    g, step = world.gradient(x["image"], codes), 1e-2
    for i in range(3):
        ends = [world.loss(x["image"] + s * step * torch.eye(32)[i], codes) for s in (1, -1)]
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), g[:, i], rtol=0.02, atol=0.005)
