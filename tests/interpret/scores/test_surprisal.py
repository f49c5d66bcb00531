"""Surprisal (oracle O6): a neutral explanation gains nothing; one that helps the model does."""

import numpy as np
import pytest

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.client import Client
from mmsae.interpret.clients.scripted import ScriptedClient
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scores.job import ScoreJob
from mmsae.interpret.scores.options import Judging
from mmsae.interpret.scores.subjects import Names, Subjects
from mmsae.interpret.scores.surprisal import NEUTRAL, gains, surprisal
from mmsae.types import InputError
from tests.helpers.interpret import WORDS, planted


def expects(prefix, text):
    """A model for which words that stand before are likely."""
    return [-1.0 if w in prefix.split() or w + "." in prefix else -3.0 for w in text.split()]


def test_the_gain_is_that_of_the_formula_and_0_for_a_neutral_name():
    asked = Asked(ScriptedClient(score=lambda p, t: expects(p.replace(".", " "), t)))
    assert gains(asked, [NEUTRAL], ["a red thing"])[0] == 0
    assert gains(asked, ["red"], ["a red thing"])[0] == pytest.approx(2 / 3)


def test_a_server_is_asked_for_log_probabilities_where_the_scorer_is_named(tmp_path):
    """Few servers echo prompts, so it is tried where it is asked for alone; then one that does not is a sentence."""

    class Server(Client):
        name = "server"

        def score(self, prefix, text):
            return np.array(expects(prefix.replace(".", " "), text))

    ev = Evidence(planted(tmp_path / "e", modality="text", n=800, embeddings={}))
    job = ScoreJob(ev, None, Judging(scorers=("surprisal",), each=4), Asked(Server(), None), 4, "cpu")
    rows, found, _ = job.run()
    assert set(rows.scorer) == {"surprisal"} and found["account"]["failed"] == 0
    assert (rows.value[rows.named & (rows.control == "")] == 1).all()
    job = ScoreJob(ev, None, Judging(each=4), Asked(ScriptedClient(lambda m: "?"), None), 4, "cpu")
    _, found, _ = job.run()
    assert "is not known to give log-probabilities: name the scorer" in found["left_out"]["surprisal"]
    assert found["left_out"]["pointing"] == "the evidence has no images to point at"
    with pytest.raises(InputError, match="client script gives no log-probabilities of a text"):
        ScoreJob(ev, None, Judging(scorers=("surprisal",)), Asked(ScriptedClient(lambda m: "?"), None), 4, "cpu").run()


def test_names_that_help_score_high_others_at_chance(tmp_path):
    ev = Evidence(planted(tmp_path / "e", modality="text", n=800))
    s = Subjects(ev, "text", Names(np.arange(8), list(WORDS), np.ones(8, bool)))
    asked = Asked(ScriptedClient(score=lambda p, t: expects(p.replace(".", " "), t)))
    found = surprisal(s, asked)
    assert (found.value == 1).all() and found.chance == 0.5 and (found.n == 20).all()
    neutral = Subjects(ev, "text", s.names._replace(phrases=[NEUTRAL] * 8))
    assert (surprisal(neutral, asked).value == 0.5).all()
    assert abs(surprisal(s.shuffled(0), asked).value.mean() - 0.5) < 0.12
