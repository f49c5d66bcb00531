"""Simulation: Pearson's r of what a judge predicts from a name with what the latent does."""

import json

import numpy as np
import pytest
from scipy.stats import pearsonr

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.scripted import ScriptedClient
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scores.simulation import correlation_scores, simulated, simulated_by, values_at
from mmsae.interpret.scores.subjects import Names, Subjects
from mmsae.interpret.shown import ItemViews
from tests.helpers.interpret import WORDS, ToyEmbedder, planted


def test_correlation_is_pearsons_with_fishers_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 30))
    b[0] += a[0]
    a[1, 20:] = np.nan
    b[2] = 1.0
    got = correlation_scores(np.arange(3), a, b)
    for row, n in ((0, 30), (1, 20)):
        want = pearsonr(a[row, :n], b[row, :n])
        low, high = want.confidence_interval()
        assert np.allclose([got.value[row], got.low[row], got.high[row]], [want.statistic, low, high])
        assert got.n[row] == n
    assert np.isnan(got.value[2]) and got.chance == 0
    same = correlation_scores(np.arange(1), a[:1], 3 * a[:1] - 2)
    assert same.value[0] == pytest.approx(1) and same.low[0] > 0.99


@pytest.fixture(scope="module")
def ev(tmp_path_factory):
    return Evidence(planted(tmp_path_factory.mktemp("simulation") / "e", modality="text", n=800))


def subjects(ev):
    return Subjects(ev, "text", Names(np.arange(8), list(WORDS), np.ones(8, bool)))


def test_values_are_those_of_the_codes(ev):
    s, z = subjects(ev), ev.codes("text").matrix().toarray()
    items = np.concatenate([s.positive, s.negative], 1)
    got = values_at(ev.lists("text"), s.latents, items)
    for row in range(8):
        has = items[row] >= 0
        assert np.allclose(got[row, has], z[items[row, has], row]) and np.isnan(got[row, ~has]).all()


def test_right_names_predict_and_others_do_not(ev):
    s, e = subjects(ev), ToyEmbedder()
    right, wrong = (simulated(t, ev.embeddings("text"), e.phrases(t.names.phrases)) for t in (s, s.shuffled(0)))
    assert right.value.min() > 0.6 and (right.low > 0).all() and abs(wrong.value.mean()) < 0.15


def says(messages):
    """A judge that looks for the name in the lines: 10 where it is, else 0."""
    text = messages[-1].text
    name = text.split('"')[1]
    lines = [line for line in text.splitlines() if line[:1].isdigit()]
    return json.dumps([10 if name in line.split() else 0 for line in lines])


def test_a_client_predicts_and_nonsense_is_counted(ev, tmp_path):
    s, views = subjects(ev), ItemViews(ev, "text")
    asked = Asked(ScriptedClient(says), tmp_path)
    found = simulated_by(s, asked, views, each=8)
    assert found.value.min() > 0.8 and (found.n == 16).all()
    assert abs(simulated_by(s.shuffled(0), asked, views, each=8).value.mean()) < 0.25
    for answer in ("[1, 2]", "no idea", "[11, 0, 0, 0, 0]", "[true, 0, 0, 0, 0]"):
        vague = Asked(ScriptedClient(lambda m, a=answer: a), None)
        none = simulated_by(s, vague, views, each=5)
        assert np.isnan(none.value).all() and (none.n == 0).all() and vague.counts["nonsense"] == 8 * 2
