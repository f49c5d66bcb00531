"""Surprisal (oracle O6): a neutral explanation gains nothing; one that helps the model does."""

import numpy as np
import pytest

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.scripted import ScriptedClient
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scores.subjects import Names, Subjects
from mmsae.interpret.scores.surprisal import NEUTRAL, gains, surprisal
from tests.helpers.interpret import WORDS, planted


def expects(prefix, text):
    """A model for which words that stand before are likely."""
    return [-1.0 if w in prefix.split() or w + "." in prefix else -3.0 for w in text.split()]


def test_the_gain_is_that_of_the_formula_and_0_for_a_neutral_name():
    asked = Asked(ScriptedClient(score=lambda p, t: expects(p.replace(".", " "), t)))
    assert gains(asked, [NEUTRAL], ["a red thing"])[0] == 0
    assert gains(asked, ["red"], ["a red thing"])[0] == pytest.approx(2 / 3)


def test_names_that_help_score_high_others_at_chance(tmp_path):
    ev = Evidence(planted(tmp_path / "e", modality="text", n=800))
    s = Subjects(ev, "text", Names(np.arange(8), list(WORDS), np.ones(8, bool)))
    asked = Asked(ScriptedClient(score=lambda p, t: expects(p.replace(".", " "), t)))
    found = surprisal(s, asked)
    assert (found.value == 1).all() and found.chance == 0.5 and (found.n == 20).all()
    neutral = Subjects(ev, "text", s.names._replace(phrases=[NEUTRAL] * 8))
    assert (surprisal(neutral, asked).value == 0.5).all()
    assert abs(surprisal(s.shuffled(0), asked).value.mean() - 0.5) < 0.12
