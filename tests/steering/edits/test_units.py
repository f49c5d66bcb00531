"""Statistics of features, units of strength, the search for a divergence, and YAML of whole interventions."""

import math

import pytest
import torch
import yaml

from mmsae import InputError, Tokens
from mmsae.activations import ActivationStore
from mmsae.activations.memory import write_store
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.steering import Edit, FeatureStats, Intervention, search_kl
from mmsae.steering.edits.units import PERCENTILES
from mmsae.types import Codes
from tests.helpers.steer_saes import F, items, make, mean_kl


def codes(values):
    return Codes(torch.as_tensor(values, dtype=torch.float32), None, len(values[0]))


def test_by_hand():
    stats = FeatureStats.of_codes([codes([[0.0, 2.0, 0.0], [1.0, 4.0, 0.0]]), codes([[0.0, 6.0, 0.0]])])
    assert stats.n == 3 and stats.fired.tolist() == [1, 3, 0]
    assert stats.mean_active.tolist() == [1, 4, 0] and stats.max.tolist() == [1, 6, 0]
    assert torch.allclose(stats.mean_all, torch.tensor([1 / 3, 4, 0])) and torch.allclose(
        stats.mean_all, stats.mean_active * stats.rate
    )
    assert stats.live().tolist() == [0, 1] and stats.live(high=0.5).tolist() == [0]
    assert stats.unit("x_mean_active", [1, 0]).tolist() == [4, 1] and stats.unit("x_max", [1]).tolist() == [6]
    assert stats.unit("raw", [2]).tolist() == [1]


def test_of_signed_codes_both_poles_count_as_active_by_their_size():
    stats = FeatureStats.of_codes([codes([[2.0], [-4.0], [0.0], [1.0]])])
    assert stats.fired.tolist() == [3] and stats.rate.tolist() == [0.75] and stats.max.tolist() == [4]
    torch.testing.assert_close(stats.mean_active, torch.tensor([7 / 3]))
    assert stats.mean_all.tolist() == [-0.25]
    mirrored = FeatureStats.of_codes([codes([[-2.0], [4.0], [0.0], [-1.0]])])
    assert torch.equal(stats.percentiles, mirrored.percentiles) and stats.live(0.5).tolist() == [0]


def test_a_stream_equals_one_batch_and_percentiles_are_close():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 3, generator=g).exp() * torch.tensor([0.01, 1.0, 50.0])
    z[torch.rand(4000, 3, generator=g) < 0.7] = 0
    whole = FeatureStats.of_codes([codes(z.tolist())])
    parts = FeatureStats.of_codes(Codes(p, None, 3) for p in z.split(123))
    for name in ("fired", "max", "percentiles"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    for i in range(3):
        exact = torch.quantile(z[:, i][z[:, i] > 0], torch.tensor(PERCENTILES) / 100)
        assert torch.allclose(whole.percentiles[:-1, i], exact[:-1], rtol=0.05)  # of 1200 codes, 99.9 % is a guess
    assert whole.unit("x_p99.9", [2]) == whole.percentiles[PERCENTILES.index(99.9), 2]
    assert (whole.percentiles.diff(dim=0) >= 0).all() and (whole.percentiles <= whole.max).all()


@pytest.mark.parametrize("name", ["topk", "paired_topk", "vl_sae"])
def test_of_an_sae_and_of_a_store(tmp_path, name):
    sae, x = make(name)
    m = sae.modalities[-1]
    special = torch.arange(64) % 8 == 0
    tokens = Tokens({m: x}, {m: torch.arange(64)}, special={m: special})
    stats = FeatureStats.collect(sae, [tokens], m)
    z = sae.encode(x[~special], m).to_dense()
    assert stats.n == 56 and torch.allclose(stats.mean_all, z.mean(0), atol=1e-6) and stats.modality == m
    assert torch.allclose(stats.max, z.amax(0)) and stats.sae == sae_fingerprint(sae)
    assert FeatureStats.collect(sae, [tokens], m, tokens="all", rows=20).n == 20
    widths = {"image": x, "text": x} if len(sae.modalities) > 1 else {"image": x}
    store = write_store(tmp_path / "store", widths, [f"{i:032x}" for i in range(64)])
    of_store = FeatureStats.from_store(sae, ActivationStore(store), m, batch_size=17)
    assert of_store.n == 64 and torch.allclose(
        of_store.mean_active, FeatureStats.of_codes([sae.encode(x, m)]).mean_active
    )
    saved = of_store.save(tmp_path / "stats")
    again = FeatureStats.load(tmp_path / "stats")
    assert again.n == 64 and again.sae == stats.sae and again.path == saved.path == str(tmp_path / "stats")
    assert torch.equal(again.percentiles, of_store.percentiles)


def test_statistics_of_something_else_are_refused(tmp_path):
    sae, x = make("paired_topk")
    other, _ = make("paired_topk", seed=1)
    stats = FeatureStats.of_codes([sae.encode(x, "image")], "image", sae_fingerprint(sae))
    iv = Intervention(Edit.set(int(stats.live()[0]), 1.0), stats=stats)
    iv.bind(sae, "image")
    with pytest.raises(InputError, match="the statistics are of image codes, the site's codes are text"):
        iv.bind(sae, "text")
    with pytest.raises(InputError, match="not of this one"):
        iv.bind(other, "image")
    small = FeatureStats.of_codes([codes([[1.0, 2.0]])])
    with pytest.raises(InputError, match="statistics are of 2 features, the SAE has 48"):
        Intervention(Edit.set(0, 1.0), stats=small).bind(sae, "image")
    for unit, says in (("x_p98", "keep the percentiles"), ("x_median", "not one of"), ("x_max", "never fired")):
        with pytest.raises(InputError, match=says):
            FeatureStats.of_codes([codes([[0.0]])]).unit(unit, [0])
    with pytest.raises(InputError, match=r"stats\.json is missing"):
        FeatureStats.load(tmp_path)
    (tmp_path / "stats.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        FeatureStats.load(tmp_path)
    with pytest.raises(InputError, match="at least one batch"):
        FeatureStats.of_codes([])


def test_units_multiply_strengths():
    sae, x = make("paired_topk")
    stats = FeatureStats.of_codes([sae.encode(x, "image")], "image")
    i, j = stats.live()[:2].tolist()
    for unit, table in (("x_mean_active", stats.mean_active), ("x_max", stats.max), ("x_p90", stats.percentiles[6])):
        edit = Edit.add([i, j], [2.0, -1.0]) + Edit.clamp(i, hi=3.0) + Edit.scale(j, 5.0)
        raw = Edit.add([i, j], table[[i, j]] * torch.tensor([2.0, -1.0])) + Edit.clamp(i, hi=3 * table[i])
        want = Intervention(raw + Edit.scale(j, 5.0), unit="raw").apply(sae, x, "image")
        got = Intervention(edit, unit=unit, stats=stats).apply(sae, x, "image")
        assert torch.allclose(got, want, atol=1e-5) and not torch.allclose(got, x)
    mean = Intervention(Edit.ablate([i, j], "corpus"), unit="raw", stats=stats).raw()
    assert torch.allclose(torch.tensor(mean.ops[0].args["mean"]), stats.mean_all[[i, j]].double().float())


def test_vary_is_a_grid():
    iv = Intervention(Edit.add(3, 2.0), unit="raw")
    grid = iv.vary(strength=[1, 5], steps=[(0, 2), (2, 4)])
    assert [(i.strength, i.steps) for i in grid] == [(1, (0, 2)), (1, (2, 4)), (5, (0, 2)), (5, (2, 4))]
    assert grid[2].raw() == Edit.add([3], [10.0]) and iv.strength == 1


def test_yaml_round_trip(tmp_path):
    sae, x = make("topk")
    stats = FeatureStats.of_codes([sae.encode(x)], "image").save(tmp_path / "stats")
    i = int(stats.live()[0])
    iv = Intervention(
        Edit.scale(i, -5) + Edit.set(int(stats.live()[1]), 3.0), stats=stats, strength=2.0, branch="all",
        space=[[1.0, 0.5], [0.0, 0.25]], steps=range(0, 20), active=0.1, guard=0.9, tokens=[0, 1, 2], phase="prefill",
    )  # fmt: skip
    again = Intervention.from_dict(yaml.safe_load(yaml.safe_dump(iv.to_dict())))
    assert again.to_dict() == iv.to_dict() and again.stats.path == stats.path and again.gate.steps == (0, 20)
    plain = Intervention(Edit.add(i, 1.0), unit="rel_norm", writeback="direction")
    assert plain.to_dict() == {"edit": plain.edit.to_dict(), "unit": "rel_norm", "writeback": "direction"}
    assert torch.equal(Intervention.from_dict(plain.to_dict()).apply(sae, x), plain.apply(sae, x))
    for bad, says in (
        ({"edit": [], "steength": 2}, "unknown field steength"),
        ({"edit": [{"op": "add", "ids": [1]}]}, "missing"),
        ({"edit": [], "steps": [1]}, "intervention"),
        ({"edit": [], "stats": str(tmp_path / "none")}, "no statistics"),
    ):
        with pytest.raises(InputError, match=says):
            Intervention.from_dict(bad)
    with pytest.raises(InputError, match="not saved"):
        Intervention(Edit.add(1, 1.0), stats=FeatureStats.of_codes([sae.encode(x)])).to_dict()
    with pytest.raises(InputError, match="donor is a function"):
        Intervention(Edit.ablate(1), writeback="replace", donor=lambda *a: a[0]).to_dict()


# The search for a divergence.


def linear_softmax_kl(strength):
    """KL of a two-token model whose logit difference is 0 before and ``strength`` after: ln cosh(s / 2)."""
    return math.log(math.cosh(strength / 2)) if strength < 1000 else strength / 2 - math.log(2)


@pytest.mark.parametrize("target", [0.033, 0.1, 0.33, 1.0, 3.0])
def test_search_hits_the_closed_form(target):  # T21
    found = search_kl(linear_softmax_kl, target)
    exact = 2 * math.acosh(math.exp(target))
    assert found.converged and len(found.tried) <= 20 and abs(found.kl - target) <= 0.1 * target
    assert found.strength == pytest.approx(exact, rel=0.1) and found.tried[0][0] == pytest.approx(100)
    fine = search_kl(linear_softmax_kl, target, tolerance=1e-4, evaluations=40)
    assert fine.strength == pytest.approx(exact, rel=1e-3)


def test_search_says_when_it_does_not_get_there():  # T21
    for measure in (lambda s: 0.01, lambda s: 50.0, lambda s: 0.0 if s < 3 else 9.0, lambda s: math.nan):
        found = search_kl(measure, 0.33)
        assert not found.converged and len(found.tried) <= 20 and found.target == 0.33
    assert search_kl(lambda s: 0.01 * s, 0.33, evaluations=1).converged is False


def test_unit_kl_is_resolved_on_a_host():
    sae, x = make("topk")
    head = torch.randn(7, x.shape[1], generator=torch.Generator().manual_seed(1))

    def measure(iv):
        steered = iv.bind(sae)(x, items(64)) @ head.t()
        return mean_kl(x @ head.t(), steered)

    iv = Intervention(Edit.add(5, 1.0), unit="kl", strength=0.33)
    found, report = iv.at_kl(measure)
    assert report.converged and found.unit == "raw" and measure(found) == pytest.approx(0.33, rel=0.1)
    assert [v.strength for v in iv.vary(strength=[0.1, 1.0])] == [0.1, 1.0] and F > 5
