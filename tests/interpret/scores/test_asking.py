"""Scores by asking (oracle O5): a perfect judge gets 1, a constant one chance, and nonsense is counted, not scored."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.client import NoReply
from mmsae.interpret.clients.options import Asking
from mmsae.interpret.clients.scripted import ScriptedClient
from mmsae.interpret.evidence.folder import Evidence, ItemWords
from mmsae.interpret.scores.asking import (
    Outcomes,
    detection,
    examples_of,
    fuzzing,
    intruder,
    pointed,
    pointing,
)
from mmsae.interpret.scores.subjects import Names, Subjects
from mmsae.interpret.scores.table import ScoreRows
from mmsae.interpret.shown import ItemViews
from tests.helpers.evidence import write_evidence
from tests.helpers.interpret import WORDS, planted


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    ev = Evidence(planted(tmp_path_factory.mktemp("texts") / "e", modality="text", n=800))
    return Subjects(ev, "text", Names(np.arange(8), list(WORDS), np.ones(8, bool))), ItemViews(ev, "text")


def asked(chat, **options):
    return Asked(ScriptedClient(chat), None, Asking(retries=0, **options))


def lines(messages):
    return re.findall(r"^\d+\. (.*)$", messages[-1].text, re.M)


def knows(messages):
    found = re.search(r'"(.*?)"', messages[-1].text)
    if found is None:
        return "I was shown no description"
    name = found[1]
    return json.dumps([int(name in line.split()) for line in lines(messages)])


def test_detection(texts):
    s, views = texts
    judge = asked(knows)
    found = detection(s, judge, views)
    assert (found.value == 1).all() and found.chance == 0.5 and (found.n == 20).all() and (found.low < 1).all()
    constant = detection(s, asked(lambda m: json.dumps([1] * len(lines(m)))), views)
    assert (constant.value == 0.5).all() and (constant.low < 0.5).all() and (constant.high > 0.5).all()
    wrong = detection(s.shuffled(0), asked(knows), views)
    assert abs(wrong.value.mean() - 0.5) < 0.12


@pytest.mark.parametrize("answer", ["maybe", "[1, 0]", "", '{"a": 1}'])
def test_nonsense_is_an_abstention(texts, answer):
    s, views = texts
    judge = asked(lambda m: answer)
    found = detection(s, judge, views)
    assert np.isnan(found.value).all() and (found.n == 0).all()
    assert judge.account["nonsense"] == 8 * 4


def test_refusals_are_gone_past(texts):
    s, views = texts

    def moody(messages):
        if " striped" in messages[-1].text:
            raise NoReply("no", again=False)
        return knows(messages)

    judge = asked(moody)
    found = detection(s, judge, views)
    assert judge.account["failed"] > 0 and judge.account["reasons"] == {"no": judge.account["failed"]}
    voted = found.n > 0
    assert voted.any() and (found.value[voted & ~np.isnan(found.value)] == 1).all() and (found.n < 20).any()


def test_intruders(texts):
    s, views = texts
    truth = {}

    def odd(messages):
        """The line that lacks a word that all others have; their words are those of one latent."""
        has = [set(line.split()) for line in lines(messages)]
        for i in range(len(has)):
            rest = set.intersection(*(h for k, h in enumerate(has) if k != i)) - has[i]
            if rest:
                return f"{i + 1}"
        return "none"

    judge = asked(odd)
    found = intruder(s, judge, views, trials=10)
    assert np.nanmean(found.value) > 0.9 and found.chance == 0.2 and not truth
    first = intruder(s, asked(lambda m: "1"), views, trials=40)
    assert abs(first.value.mean() - 0.2) < 0.06 and (first.n == 40).all()
    silent = asked(lambda m: "I do not know")
    assert (intruder(s, silent, views, trials=3).n == 0).all() and silent.account["nonsense"] == 24


def test_examples_are_balanced_unseen_and_of_all_strengths(texts):
    s, _ = texts
    items, truth = examples_of(s, 10, 0)
    fires = s.ev.codes("text").matrix().toarray()
    for row, j in enumerate(s.latents):
        on = items[row][truth[row] & (items[row] >= 0)]
        off = items[row][~truth[row] & (items[row] >= 0)]
        assert len(on) == len(off) == 10 and len(set(on)) == 10
        assert (fires[on, j] > 0).all() and (fires[off, j] == 0).all()
        assert (s.ev.items.half[np.r_[on, off]] == "test").all()
        assert fires[on, j].min() < np.quantile(fires[s.positive[row][s.positive[row] >= 0], j], 0.2)
    few = Subjects(s.ev, "text", s.names)
    few.positive = np.where(np.arange(s.positive.shape[1]) < 3, s.positive, -1)
    items, truth = examples_of(few, 10, 0)
    assert ((items >= 0).sum(1) == 6).all() and (items[:, :6] >= 0).all() and (truth & (items >= 0)).sum() == 8 * 3


def token_world(folder, n=200):
    """Captions of four words, the latent of each word fires on its place."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(WORDS)[:4].tolist() for _ in range(n)]
    z = np.zeros((n, 4, 8), np.float32)
    for i, row in enumerate(rows):
        for place, word in enumerate(row):
            z[i, place, WORDS.index(word)] = 1 + rng.random()
    ev = Evidence(write_evidence(folder, {"text": z}, captions=[" ".join(r) for r in rows], quantiles=5, each=10))
    return Subjects(ev, "text", Names(np.arange(8), list(WORDS), np.ones(8, bool)))


def test_fuzzing_of_tokens(tmp_path, monkeypatch):
    s = token_world(tmp_path / "e")
    views = ItemViews(s.ev, "text")
    assert not views.places  # nobody knows which word a token is
    captions = s.ev.items.caption

    def words(item, modality):
        found = captions[item].split()
        return ItemWords(np.arange(4), [found[0], *(f" {w}" for w in found[1:])])

    monkeypatch.setattr(s.ev, "words", words)
    views = ItemViews(s.ev, "text")
    assert views.places
    text, image = views.marked(s.positive[0][0], 0)
    assert (
        "<<red>>" in text
        and image is None
        and text.replace("<<", "").replace(">>", "") == (s.ev.items.caption[s.positive[0][0]])
    )

    def right(messages):
        name = re.search(r'Is what is marked "(.*?)"', messages[-1].text)[1]
        return json.dumps([int(f"<<{name}>>" in line) for line in lines(messages)])

    found = fuzzing(s, asked(right), views)
    assert (found.value == 1).all()
    assert abs(fuzzing(s, asked(lambda m: json.dumps([0] * len(lines(m)))), views).value - 0.5).max() == 0


def test_pointing_at_patches(tmp_path):
    rng, n = np.random.default_rng(0), 60
    z, images = np.zeros((n, 16, 2), np.float32), np.zeros((n, 64, 64, 3), np.uint8)
    for i in range(n):
        if i % 3:
            place = rng.integers(16)
            z[i, place, 0] = 1
            images[i, 16 * (place // 4) :, 16 * (place % 4) :][:16, :16] = 255
    grid = {"image": (4, 4)}
    ev = Evidence(write_evidence(tmp_path / "e", {"image": z}, images=images, grid=grid, quantiles=2, each=10))
    s = Subjects(ev, "image", Names(np.array([0]), ["white square"], np.ones(1, bool)))
    views = ItemViews(ev, "image")

    def looks(messages):
        import io

        x = np.asarray(Image.open(io.BytesIO(messages[-1].images[0])).convert("L")) > 128
        rows, cols = np.nonzero(x)
        return json.dumps({"x": float(cols.mean() / 64), "y": float(rows.mean() / 64)})

    found = pointing(s, asked(looks), views)
    assert found.value[0] == 1 and found.chance.tolist() == pytest.approx([1 / 16]) and found.n[0] == 10
    corner = pointing(s, asked(lambda m: '{"x": 0.01, "y": 0.01}'), views)
    assert corner.value[0] < 0.4
    lost = asked(lambda m: '{"x": 7, "y": "left"}')
    assert pointing(s, lost, views).n[0] == 0 and lost.account["nonsense"] == 10
    crop = np.asarray(views.crop(s.positive[0][0], 0, cells=1))
    assert crop.shape[:2] == (16, 16) and crop.mean() > 240
    red = np.asarray(Image.open(__import__("io").BytesIO(views.marked(s.positive[0][0], 0)[1])))
    assert (red[..., 0].astype(int) - red[..., 2]).max() > 60


def test_chance_of_pointing_is_that_of_each_latents_own_images(tmp_path):
    """A point anywhere in the image hits a latent on half of the patches half as often as one on all of them."""
    z = np.zeros((60, 16, 3), np.float32)
    some = np.arange(60) % 3 > 0
    z[some, :8, 0], z[some, :, 1], z[some, 0, 2] = 1, 1, 1
    images, grid = np.zeros((60, 32, 32, 3), np.uint8), {"image": (4, 4)}
    ev = Evidence(write_evidence(tmp_path / "e", {"image": z}, images=images, grid=grid, quantiles=2, each=10))
    s, views = Subjects(ev, "image", Names(np.arange(3), list("abc"), np.ones(3, bool))), ItemViews(ev, "image")
    found = pointing(s, asked(lambda m: '{"x": 0.9, "y": 0.9}'), views)
    assert found.chance.tolist() == pytest.approx([0.5, 1, 1 / 16]) and found.value.tolist() == [0, 1, 0]
    assert ScoreRows.of(s, "pointing", found).chance.tolist() == pytest.approx([0.5, 1, 1 / 16])
    ev.items.view[:] = [0, 0, 0.5, 1]  # the host looks at the left half
    found = pointing(s, asked(lambda m: '{"x": 0.9, "y": 0.9}'), views)
    assert found.chance.tolist() == pytest.approx([0.25, 0.5, 1 / 32]) and (found.value == 0).all()


def test_a_point_outside_of_the_view_is_no_hit():
    strong = np.array([[True, False], [False, False]])
    half = np.array([0.5, 0.0, 1.0, 1.0])
    assert pointed((0.6, 0.2), strong, half) and not pointed((0.9, 0.2), strong, half)
    assert not pointed((0.2, 0.2), strong, half) and pointed((0.5, 0.0), strong, half)


def test_votes_of_one_side_only_have_no_balanced_accuracy():
    truth, vote = np.array([[True, True, False]]), np.array([[1, 0, -1]])
    s = Outcomes(truth, vote).scores(np.array([3]))
    assert np.isnan(s.value[0]) and s.n[0] == 2
    s = Outcomes(truth, np.array([[1, 0, 0]])).scores(np.array([3]))
    assert s.value[0] == 0.75
