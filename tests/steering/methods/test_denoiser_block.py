"""Block steering on a toy host whose pictures are its states: masks, branches, steps, and T25."""

import warnings

import pytest
import torch

from mmsae.steering import Edit, FeatureStats, Intervention, attach
from mmsae.steering.measure.controls import CONTROLS, Control, controls, with_atoms
from mmsae.steering.measure.images import locality
from mmsae.steering.measure.scorers import after, change, inside
from mmsae.steering.measure.sweep import doses, sweep, verdicts
from mmsae.steering.methods.denoiser_block import paint
from mmsae.types import InputError
from tests.helpers.steer_toys import COLOURS, SITE, ToyDiffusion, amount, toy_sae

LEFT = torch.tensor([[1.0, 1, 0, 0]] * 4)


@pytest.fixture(autouse=True)
def large_changes_are_wanted_here():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*may break")
        yield


def stats(sae, mean=0.5):
    rows = torch.full((10, 8), mean)
    rows[5:] = 0.0
    return FeatureStats.of_codes([toy_sae(k=8).encode(rows)], "image")


def test_paint_adds_multiples_of_the_mean_inside_the_mask_only():
    host, sae = ToyDiffusion(), toy_sae()
    before = host.generate(["green"], seed=1)
    with attach(host, {SITE: (sae, paint(0, stats(sae), LEFT, beta=1.0))}):
        painted = host.generate(["green"], seed=1)
    moved = painted - before
    torch.testing.assert_close(moved[0, 0], 0.5 * LEFT, rtol=1e-5, atol=1e-6)
    assert torch.equal(painted[0, 1:], before[0, 1:]) and torch.equal(painted[0, :, :, 2:], before[0, :, :, 2:])
    assert locality(before, painted, LEFT).share == 1


@pytest.mark.parametrize(("guided", "want"), [(False, 1.0), (True, 5.0)])
def test_t10_the_guided_variant_counts_two_g_minus_one_times(guided, want):
    host, sae, g = ToyDiffusion(), toy_sae(), 3.0
    before = host.generate(["green"], seed=1, guidance=g)
    with attach(host, {SITE: (sae, paint(0, stats(sae), beta=0.1, guided=guided))}):
        painted = host.generate(["green"], seed=1, guidance=g)
    torch.testing.assert_close((painted - before)[0, 0], torch.full((4, 4), 0.05 * want), rtol=1e-4, atol=1e-5)


def test_negative_paint_pushes_below_what_a_code_could_lose():
    host, sae = ToyDiffusion(), toy_sae(k=8)
    states = []
    with (
        attach(host, {SITE: (sae, paint(3, stats(sae), beta=-1.0))}),
        host.edit(SITE, lambda rows, where: states.append(rows) or rows, where=True),
    ):
        host.generate(["green"], steps=1, seed=1)
    assert states[0][:, 3].max() < -0.39, "noise of at most .1, minus .5"


def test_steps_are_a_half_open_window():
    host, sae = ToyDiffusion(), toy_sae()
    before = host.generate(["green"], seed=1, steps=4)
    with attach(host, {SITE: (sae, paint(0, stats(sae), beta=1.0, steps=(1, 3)))}) as log:
        painted = host.generate(["green"], seed=1, steps=4)
    torch.testing.assert_close((painted - before)[0, 0], torch.full((4, 4), 0.25), rtol=1e-4, atol=1e-6)
    assert [r["step"] for r in log.table()] == [1, 2]


def test_one_colour_goes_out_inside_a_mask_and_another_comes_in():
    host, sae = ToyDiffusion(), toy_sae()
    edit = Edit.ablate([0]) + Edit.add([2], 2.0)
    iv = Intervention(edit, stats=stats(sae), space=LEFT, branch="all")
    with attach(host, {SITE: (sae, iv)}):
        picture = host.generate(["red"], seed=1)[0]
    assert picture[2, :, :2].min() > 0.9 and picture[0, :, :2].max() < 0.2, "blue left"
    assert picture[0, :, 2:].min() > 0.9 and picture[2, :, 2:].max() < 0.2, "red right"


def test_a_control_moves_the_same_rows_as_far_in_another_direction():
    sae = toy_sae()
    iv = paint(0, stats(sae), LEFT, beta=1.0)
    host = ToyDiffusion()
    states = {}

    def record(name):
        return lambda rows, where: states.__setitem__(name, rows) or rows

    for name, way in {"none": None, "feature": iv, "control": Control(iv, seed=3)}.items():
        with attach(host, {SITE: (sae, way)} if way else {}), host.edit(SITE, record(name), where=True):
            host.generate(["green"], steps=1, seed=1)
    dx, control = states["feature"] - states["none"], states["control"] - states["none"]
    torch.testing.assert_close(control.norm(dim=1), dx.norm(dim=1))
    drawn = Control(iv, seed=3).draw(sae)[0]
    assert drawn != 0 and control.abs().argmax(1)[dx.any(1)].unique().tolist() == [drawn]
    assert torch.equal(states["control"][~dx.any(1)], states["none"][~dx.any(1)])


def test_controls_need_live_features_and_atoms():
    sae = toy_sae()
    with pytest.raises(InputError, match="drawn from live features"):
        Control(Intervention(Edit.add(0, 1.0), unit="raw")).bind(sae)
    with pytest.raises(InputError, match="as many other live ones, there are 0"):
        Control(Intervention(Edit.add(0, 1.0), unit="raw"), torch.tensor([0])).bind(sae)
    with pytest.raises(InputError, match="does not write atoms"):
        Control(Intervention(Edit.ablate(0), unit="raw", writeback="splice"), torch.arange(8)).bind(sae)
    other = with_atoms(sae, "image", {0: 5})
    assert torch.equal(other.dictionary("image").rows()[0], torch.eye(8)[5])
    assert torch.equal(sae.dictionary("image").rows(), torch.eye(8)), "the SAE itself is as before"
    rows = torch.rand(3, 8)
    assert torch.equal(other.encode(rows).values, sae.encode(rows).values)


def test_t25_a_planted_concept_has_a_monotone_dose_response_and_random_features_none():
    """Blue is axis 2; axes 4 to 7 are in no picture, and random features are drawn from them."""
    host, sae = ToyDiffusion(), toy_sae()
    way = lambda s: {SITE: (sae, paint(2, stats(sae), LEFT, beta=s))}  # noqa: E731
    arms = doses("blue", [0.2, 0.4, 0.6, 0.8, 1.0], way)
    arms += controls(arms, n=4, live=torch.arange(4, 8))
    metrics = {
        "blue": change(amount("blue")),
        "red": change(amount("red")),
        "in": inside(LEFT),
        "after": after(amount("blue")),
    }
    table = sweep(host, ["green", "red left"], arms, metrics, seeds=[0, 1], batch_size=3, steps=2)
    got = verdicts(table, "blue")
    assert (got.rho == 1).all() and (got.win_rate == 1).all() and (got.controls == 4).all()
    assert got.control.abs().max() < 1e-6 and (got["size"] > 1e3).all()
    assert got.effect.tolist() == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25], abs=1e-3), (
        "half of the picture, .5 a unit"
    )
    control_rows = table[(table.control == 0) & (table.metric == "blue")]
    assert control_rows.value.abs().max() < 1e-6
    assert table[(table.metric == "in") & (table.control == -1) & (table.strength > 0)].value.min() == 1
    assert CONTROLS >= 20 and len(COLOURS) == 3
