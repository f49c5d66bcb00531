"""The parts of benchmarks/pushed.py: its judge, and what counts as said."""

import numpy as np
import pytest

from benchmarks.pushed import CLIENT, ROWS, has, table
from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.scores.intervention import KINDS, gain


def test_the_judge_counts_the_words_of_the_text_alone():
    """Of "a red ring" and of "a blue ring", and the frame's own words ("about", "text") are none of them."""
    asked = Asked(CLIENT, None)
    found = gain(asked, ["red", "red ring", "about"], ["a blue ring"] * 3, ["a red ring"] * 3)
    assert found == pytest.approx([np.log(1.1 / 0.1)] * 2 + [0])
    assert CLIENT.score("Text: a red ring\n\nThis text is about ", "red dog") == pytest.approx(
        np.log([1.1 / 8, 0.1 / 8])
    )


def test_an_answer_has_a_name_by_its_words():
    assert has("red on the", ["small striped red ring"]) and has("gray background", ["on a gray background"])
    assert not has("solid red", ["a red ring", "a solid ring"])


def test_every_kind_of_gain_has_a_row():
    known = {("intervention" + (f"_{k}" if k else ""), control) for k, control in KINDS}
    assert known <= set(ROWS)
    cell = {"mean": 1.0, "low": 0.5, "high": 1.5, "latents": 4}
    found = {
        "seed": 3,
        "rows": dict.fromkeys(ROWS.values(), cell),
        "steered": {"latents": 7, "own": 0.71, "others": 0.2},
    }
    text = table([found, found])
    assert text.count("1.00 [0.50, 1.50]") == 2 * len(ROWS) and "| another's | 0.20 | 0.20 |" in text
