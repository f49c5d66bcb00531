import numpy as np
import pytest

from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scenarios.ranking import run_query
from mmsae.world.generator.scene import CONCEPTS
from tests.helpers.scenarios import oracle_world

NAMES = dict(enumerate(CONCEPTS))
QUERIES = {  # and the truth by the world's table
    "red & circle": lambda t: t("red") & t("circle"),
    "purple & ~small": lambda t: t("purple") & ~t("small"),
    "(ring | cross) & dark": lambda t: (t("ring") | t("cross")) & t("dark"),
    '"two objects" & "left of" & striped': lambda t: t("two objects") & t("left of") & t("striped"),
    "~(red | green | blue)": lambda t: ~(t("red") | t("green") | t("blue")),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "e"
    data, _ = oracle_world(folder)
    return Evidence(folder), data


@pytest.mark.parametrize("text", QUERIES)
def test_an_oracle_finds_all_and_nothing_else(world, text):
    evidence, data = world
    truth = QUERIES[text](lambda name: data.concepts[:, CONCEPTS.index(name)])
    found = run_query(text, {"image": evidence.lists("image")}, names=NAMES, most=evidence.n)
    assert found.support == truth.sum()
    assert truth[found.items[: found.support]].all()  # what it holds of comes first
    assert found.rarity == pytest.approx(-np.log((truth.sum() + 1) / (evidence.n + 2)))


def test_surprise_is_of_conjunctions(world):
    evidence, data = world
    lists = {"image": evidence.lists("image")}
    n, count = evidence.n, {c: data.concepts[:, CONCEPTS.index(c)].sum() for c in ("left", "two objects")}
    apart = run_query('left & "two objects"', lists, names=NAMES)
    assert apart.support == 0 and apart.surprise == pytest.approx(
        np.log(1 / (n + 2)) - sum(np.log((c + 1) / (n + 2)) for c in count.values())
    )
    assert apart.surprise < -3  # a position belongs to a lone object
    assert run_query("left", lists, names=NAMES).surprise is None


def test_failures_of_what_it_holds_of(world):
    evidence, data = world
    red = data.concepts[:, CONCEPTS.index("red")]
    failed = np.where(red, 1.0, 0.0)
    failed[:100] = np.nan
    found = run_query("red", {"image": evidence.lists("image")}, names=NAMES, failed=failed).failures
    assert found["rate"] == 1 and found["items"] == red[100:].sum()
    assert found["lift"] == pytest.approx(1 / red[100:].mean())


def test_what_a_denied_concept_misses_is_said(world):
    evidence, _data = world
    captions = evidence.items.caption
    told = np.array(["red" in c.split() for c in captions])
    fires = np.zeros(evidence.n, bool)
    items, _ = evidence.lists("image").row(CONCEPTS.index("green"))
    fires[items] = True
    lists = {"image": evidence.lists("image")}
    names = {**NAMES, CONCEPTS.index("green"): "red", CONCEPTS.index("red"): "other"}
    found = run_query(f"circle & ~#{CONCEPTS.index('green')}", lists, names=names, captions=captions)
    assert found.misses == {"red": pytest.approx((told & ~fires).sum() / told.sum())}
    assert run_query("circle & ~~red", lists, names=NAMES, captions=captions).misses == {}
    assert run_query("circle & ~red", lists, names=NAMES, captions=captions).misses == {"red": 0}
