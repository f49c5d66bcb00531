"""The tidy table: every arm sees the same prompts and noise, and the arithmetic of its summaries is by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mmsae.report.figures import write_png
from mmsae.steering import Edit, Intervention
from mmsae.steering.measure.controls import controls
from mmsae.steering.measure.plots import before_after, dose_plot
from mmsae.steering.measure.scorers import after
from mmsae.steering.measure.sweep import COLUMNS, Item, collect, doses, noise, plan, rows_of, summary, sweep, verdicts
from mmsae.types import InputError
from tests.helpers.steer_toys import SITE, ToyDiffusion, amount, toy_sae


def red(strength):
    return {SITE: (toy_sae(), Intervention(Edit.add(0, 1.0), unit="raw", strength=strength))}


def test_every_arm_sees_the_same_prompts_noise_and_schedule():
    host, kept = ToyDiffusion(), {}
    arms = doses("red", [0.5, -0.5], red)
    arms += controls(arms[:1], n=2, live=torch.arange(8))
    seen = collect([Item("blue left", noise(1, 1))], kept)
    table = sweep(
        host, ["green", "blue left"], arms, {"red": after(amount("red"))}, seeds=[1, 2], batch_size=3, watch=seen,
        steps=2, guidance=2.0,
    )  # fmt: skip
    assert tuple(table.columns) == COLUMNS
    assert len(table) == (1 + 2 + 2) * 4 * 2, "arms, pictures, metrics"
    for calls in (host.calls[:5], host.calls[5:]):
        assert all(c == calls[0] for c in calls), "before and after have the same noise"
    assert [c[0] for c in host.calls[::5]] == [["green", "green", "blue left"], ["blue left"]]
    assert [c[1] for c in host.calls[::5]] == [[1, 2, 1_000_004], [1_000_005]], "prompts have noise of their own"
    green, blue = (set(table[table.prompt == p].seed) for p in ("green", "blue left"))
    assert green == {1, 2} and blue == {1_000_004, 1_000_005}, "the table names the noise"
    base = table[table.intervention == "none"]
    assert (base.relative == 0).all() and (base[base.metric == "moved"].value == 0).all()
    mine = table[(table.intervention == "red") & (table.control < 0) & (table.strength == 0.5)]
    assert (mine.share == 0.5).all() and mine.relative.min() > 0, "the conditional half"
    assert set(kept) == {("none", 0.0, -1), ("red", 0.5, -1), ("red", -0.5, -1), ("red", 0.5, 0), ("red", 0.5, 1)}
    assert all(list(v) == [Item("blue left", 1_000_004)] for v in kept.values())


def test_a_pictures_row_does_not_depend_on_its_batch():
    arms = doses("red", [0.5], red)
    options = {"metrics": {"red": after(amount("red"))}, "seeds": [1, 2], "steps": 2}
    a, b = (sweep(ToyDiffusion(), ["green", "blue left"], arms, batch_size=n, **options) for n in (1, 4))
    key = ["intervention", "prompt", "seed", "metric"]
    a, b = a.sort_values(key), b.sort_values(key)
    np.testing.assert_allclose(a.value, b.value, rtol=1e-5, atol=1e-7)


def test_a_way_may_be_a_function_of_prompts_and_seeds():
    from contextlib import nullcontext

    given = []
    arms = doses("f", [1.0], lambda s: lambda prompts, seeds: given.append((prompts, seeds)) or nullcontext())
    table = sweep(ToyDiffusion(), ["green"], arms, seeds=[3, 4], steps=1)
    assert given == [(["green", "green"], [3, 4])]
    assert table[table.intervention == "f"].relative.isna().all(), "it keeps no log"
    with pytest.raises(InputError, match="no random control"):
        controls(arms)


def hand_table():
    rows = [("none", -1, 0.0, p, 0, "m", v) for p, v in (("a", 0.0), ("b", 2.0))]
    rows += [("x", -1, s, p, 0, "m", v + s) for s in (1.0, 2.0) for p, v in (("a", 0.0), ("b", 2.0))]
    rows += [("x", c, 2.0, p, 0, "m", v) for c, v in ((0, 1.0), (1, 3.0)) for p in ("a", "b")]
    return pd.DataFrame(rows, columns=list(COLUMNS[:-2])).assign(relative=0.1, share=0.5)


def test_summaries_by_hand():
    got = summary(hand_table()).set_index(["intervention", "control", "strength"])
    assert got.loc[("x", False, 2.0), "mean"] == 3 and got.loc[("x", True, 2.0), "mean"] == 2
    assert tuple(got.loc[("x", False, 2.0), ["low", "high", "n"]]) == (2, 4, 2)
    v = verdicts(hand_table(), "m").set_index("strength")
    assert v.loc[2.0, ["rho", "effect", "control", "size", "controls"]].tolist() == pytest.approx(
        [1, 3, 2, 0.5**0.5, 2]
    )
    assert v.loc[2.0, "win_rate"] == pytest.approx((1 + 1 + 0 + 1) / 4) and v.loc[2.0, "beaten"] == 0.75
    assert np.isnan(v.loc[1.0, "size"]) and v.loc[1.0, "controls"] == 0
    with pytest.raises(InputError, match="no metric 'other': it has m"):
        rows_of(hand_table(), "other")


def test_plans_and_bad_sweeps():
    b = noise(0, 1)
    assert plan(["a", "b"], [0, 1], 3) == [[("a", 0), ("a", 1), ("b", b)], [("b", b + 1)]] and noise(5, 0) == 5
    arms = doses("red", [1.0], red)
    for prompts, seeds, which, match in (
        ([], [0], arms, "different prompts"),
        (["a", "a"], [0], arms, "different prompts"),
        (["a"], [0, 0], arms, "different seeds"),
        (["a"], [0], arms * 2, "twice"),
    ):
        with pytest.raises(InputError, match=match):
            sweep(ToyDiffusion(), prompts, which, seeds=seeds)
    for strengths in ([0.0, 1.0], [1.0, 1.0]):
        with pytest.raises(InputError, match="different and not 0"):
            doses("red", strengths, red)


def test_bad_interventions_are_refused_before_anything_is_drawn():
    host, sae = ToyDiffusion(), toy_sae()
    cases = [
        (Intervention(Edit.add(9, 1.0), unit="raw"), "feature 9 is not one of the SAE's 8 latents"),
        (Intervention(Edit.add(0, 1.0)), "needs statistics"),
    ]
    for iv, match in cases:
        with pytest.raises(InputError, match=match):
            sweep(host, ["a"], doses("x", [1.0], lambda s, iv=iv: {SITE: (sae, iv)}), steps=2)
    with pytest.raises(InputError, match="schedule has 2 steps"):
        iv = Intervention(Edit.add(0, 1.0), unit="raw", steps=(1, 3))
        sweep(host, ["a"], doses("x", [1.0], lambda s: {SITE: (sae, iv)}), steps=2)
    other = toy_sae()
    other.sites = {"image": replace(SITE, module="elsewhere")}
    with pytest.raises(InputError, match="trained at elsewhere:out, not at block:out"):
        sweep(host, ["a"], doses("x", [1.0], lambda s: {SITE: (other, cases[1][0])}), steps=2)
    assert host.active_sites() == []


def test_pictures_are_written(tmp_path):
    host, kept = ToyDiffusion(), {}
    arms = doses("red", [0.5, 1.0], red)
    arms += controls(arms, n=3, live=torch.arange(8))
    items = [Item("green", 0), Item("blue left", noise(0, 1))]
    table = sweep(host, ["green", "blue left"], arms, seeds=[0], watch=collect(items, kept), steps=1)
    path = write_png(before_after(kept, "red"), tmp_path / "grid.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    figure = dose_plot(table, ["moved"], "dose")
    [line, dashed] = [x for x in figure.axes[0].get_lines()]
    assert line.get_xdata().tolist() == [0, 0.5, 1] and line.get_label() == "red" and "random" in dashed.get_label()
    assert write_png(figure, tmp_path / "dose.png").stat().st_size > 1000


def test_more_controls_than_live_features_are_said():
    arms = doses("red", [0.5], red)
    with pytest.warns(UserWarning, match="200 random controls were asked for, but 8 features are live: 8 are used"):
        assert len(controls(arms, n=200, live=torch.arange(8))) == 8
