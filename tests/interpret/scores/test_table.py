"""The table of scores and its summary."""

import numpy as np
import pytest

from mmsae.interpret.scores.outcomes import Scores
from mmsae.interpret.scores.subjects import Names, Subjects
from mmsae.interpret.scores.table import ScoreRows, summary


def rows(control="", values=(0.9, 0.7, np.nan, 0.5)):
    v = np.array(values)
    s = Subjects(None, "image", Names(np.arange(4), list("abcd"), np.array([True, True, True, False])), control)
    return ScoreRows.of(s, "judge", Scores(np.arange(4), v, 0.5, np.full(4, 20), v - 0.1, v + 0.1))


def test_means_are_of_named_latents_and_of_all_and_missing_ones_are_counted(tmp_path):
    table = ScoreRows.joined([rows(), rows("random", (0.5, 0.5, 0.5, 0.5))])
    found = {(r["control"], r["which"]): r for r in summary(table)}
    named, every = found["", "named"], found["", "all"]
    assert named["mean"] == pytest.approx(0.8) and named["latents"] == 2 and named["missing"] == 1
    assert every["mean"] == pytest.approx(0.7) and every["latents"] == 3 and every["chance"] == 0.5
    assert every["above"] == pytest.approx(2 / 3) and every["low"] < 0.7 < every["high"] and every["outcomes"] == 20
    assert found["random", "all"]["mean"] == 0.5 and found["random", "all"]["above"] == 0
    table.write(tmp_path)
    again = ScoreRows.read(tmp_path)
    assert again.control.tolist() == [""] * 4 + ["random"] * 4 and again.value.dtype == np.float32
    assert again.latent.dtype == np.int32 and np.array_equal(again.value, table.value, equal_nan=True)


def test_of_one_latent_the_interval_is_that_of_its_outcomes():
    [named, every] = summary(rows(values=[np.nan, 0.7, np.nan, np.nan]))
    assert named["latents"] == every["latents"] == 1 and every["low"] == pytest.approx(0.6)
    assert every["high"] == pytest.approx(0.8) and every["above"] == 1


def test_what_nobody_could_score_is_left_out():
    assert summary(rows(values=[np.nan] * 4)) == []
