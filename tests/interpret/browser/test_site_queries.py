"""Queries in the browser: what they score and hold of is what ``mmsae.metrics.concepts.query`` says."""

import json

import numpy as np
import pytest

from mmsae.interpret.areas.relations import CorpusAreas
from mmsae.interpret.browser import areas as browser_areas
from mmsae.interpret.browser.command import explore
from mmsae.interpret.browser.options import Display
from mmsae.interpret.evidence.folder import Evidence
from mmsae.metrics.concepts.names import LatentName, write_names
from mmsae.metrics.concepts.query import evaluate
from tests.helpers.browser import SAE, read
from tests.helpers.evidence import write_evidence
from tests.helpers.window import texts, type_

NAMES = {0: "word zero", 3: "spot", 4: "Spot", 5: "Straße", 6: "spots"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A browser of eight latents with up to three spots each on 8 x 8 patches, of which two latents a sample are kept
    for queries without areas; some samples are no example of any latent, and some latents have few values.
    """
    rng, n, d = np.random.default_rng(0), 150, 8
    image, text = np.zeros((n, 8, 8, d)), np.zeros((n, 1, d))
    for i in range(n):
        for j in np.flatnonzero(rng.random(d) < 0.5):
            for _ in range(rng.integers(1, 4)):
                (r, c), (h, w) = rng.integers(0, 6, 2), rng.integers(1, 4, 2)
                image[i, r : r + h, c : c + w, j] += 0.4 + rng.random(
                    (len(range(r, min(r + h, 8))), len(range(c, min(c + w, 8))))
                )
        text[i, 0] = np.round(rng.random(d), 1) * (rng.random(d) < 0.3)  # equal values are equal ranks
    image[4:, ..., 7] = 0  # percentiles that are whole quarters, on which comparisons stand
    image[:4, 3, 3, 7] = 1, 2, 3, 4
    folder = tmp_path_factory.mktemp("queries")
    codes = {"image": image.reshape(n, 64, d), "text": text}
    of = {"captions": ["said"] * n, "images": np.full((n, 16, 16, 3), 128, np.uint8), "grid": {"image": (8, 8)}}
    write_evidence(folder / "e", codes, **of, n_top=6, each=2)
    write_names(folder / "e/names/names.json", {j: LatentName(x, "captions") for j, x in NAMES.items()}, SAE)
    explore(str(folder / "e"), out=str(folder / "browser"), progress=False, display=Display(codes=d))
    explore(str(folder / "e"), out=str(folder / "cut"), progress=False, display=Display(codes=2))
    explore(str(folder / "e"), out=str(folder / "plain"), progress=False, display=Display(maps=0))
    return folder / "browser"


def scored(window, query):
    """uids, scores and whether it holds, in the browser."""
    return window.run(f"""mmsae.panel("main").then(async (p) => {{
        const tree = mmsae.parseQuery({json.dumps(query)});
        const found = await Promise.all([false, true].map((fires) => mmsae.evaluateQuery(p, tree, fires)));
        return [(await mmsae.load("main/samples")).uid, ...found.map((x) => [...x])];
    }})""")


def truth(folder, query):
    evidence = Evidence(folder.parent / "e")
    of = {"names": NAMES, "areas": CorpusAreas.of_evidence(evidence)}
    lists = {m: evidence.lists(m) for m in evidence.modalities}
    return evaluate(query, lists, **of), evaluate(query, lists, **of, holds=True)


@pytest.mark.parametrize(
    "query",
    [
        "#3", "#3 & ~image:#1", "(#0 | #1) & #2", "~(#3 > .5) & image:#3", '"word zero" | text:#5', "", "~~#2",
        "spot & ~text:spot", '"sp?t*"', '"STRASSE" | #1', "image:#7 > .5", "image:#7 >= .5", "image:#7 == .25",
        "~image:#7 < .5", "text:#2 > .3 | text:#2 == 1", "count(#3) >= 2", "~(count(#0) < 1) & #1", "count(#3) == 2",
        "count(spot) >= 2 & ~#1", 'count("word zero") > 1 | count(#7) >= 1', "count(text:#3) <= 1",
    ],
)  # fmt: skip
def test_queries_score_and_hold_as_in_python(at, query):
    w = at("#/query", "document.querySelector('input.query')")
    uids, score, holds = scored(w, query)
    expected, held = (x[[int(u, 16) for u in uids]] for x in truth(at.folder, query))
    assert 20 < len(uids) < 150 and (query == "" or len(set(expected)) + len(set(held)) > 2)
    assert np.array_equal(expected, np.float32(score)) and np.array_equal(held, np.array(holds) > 0)


def test_counts_do_not_depend_on_what_is_kept_of_a_sample(at):
    w = at("#/query", "document.querySelector('input.query')", "cut")
    uids, score, _ = scored(w, "count(#3) >= 1")
    assert np.array_equal(truth(at.folder, "count(#3) >= 1")[0][[int(u, 16) for u in uids]], score)
    kept = scored(w, "image:#3")[1]
    assert any(counted and not fires for counted, fires in zip(score, kept, strict=True))


def test_areas_are_counted_by_blocks_of_items(made, monkeypatch):
    evidence, number = Evidence(made.parent / "e"), np.full(150, -1, np.int32)
    shown = [int(u, 16) for u in read(made, "main/samples")["uid"]]
    number[shown] = np.arange(len(shown))
    monkeypatch.setattr(browser_areas, "ENTRIES", 500)
    found, areas = browser_areas.ShownAreas(evidence, number, NAMES), CorpusAreas.of_evidence(evidence)
    assert list(found.together) == [(3, 4)]
    assert np.array_equal(found.together[3, 4], areas.count([3, 4])[shown])
    assert found.single.nnz > 200
    for j in range(8):
        assert np.array_equal(found.single[j].toarray()[0], areas.count([j])[shown])


def test_what_holds_comes_first_and_the_rest_is_pale(at):
    w = at("#/query?q=%231%20%26%20~image:%233", "document.querySelectorAll('.sample .caption').length > 3")
    _, score, holds = scored(w, "#1 & ~image:#3")
    pale = sum(s > 0 and not h for s, h in zip(score, holds, strict=True))
    said = texts(w, ".hint")[0]
    assert (
        said.startswith(f"Holds of {sum(holds)} samples of the {len(score)}") and f"; {pale} that fit in part" in said
    )
    w.run("document.querySelector('.virtual').scrollTop = 1e6")
    w.wait("document.querySelector('.slot.faint')")


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("#3 &", "a latent (#12) or a name"), ("(#3", "a closing bracket"), ("#3 #4", "& or |"), ("nobody", "is named"),
        ("#99", "no latent #99"), ("#3 > x", "a number"), ("^", "means nothing"), ("count(#3)", "a comparison"),
        ("count(#3 | #4) > 1", "a closing bracket"), ("left_of(#3) > 0", "a comma"), ("~" * 200 + "#1", "100 levels"),
        ("left_of(#3, #4)", "mmsae analyse retrieve"), ("overlap(#3, spot) > .1", "mmsae analyse retrieve"),
        ('count("spot*") >= 2', "is 3 latents, whose areas"), ("sound:#3", "asks for sound"),
    ],
)  # fmt: skip
def test_wrong_queries_say_what_is_wrong(at, query, says):
    w = at("#/query", "document.querySelector('input.query')")
    type_(w, "input.query", query)
    w.wait("document.querySelector('.hint.wrong')")
    assert says in texts(w, ".hint.wrong")[0] and w.run("document.querySelectorAll('.sample').length") == 0


def test_without_areas_a_count_says_so(at):
    w = at("#/query?q=count(%233)%20%3E%201", "document.querySelector('.hint.wrong')", "plain")
    assert "--maps 0" in texts(w, ".hint.wrong")[0]


def test_a_query_is_made_on_the_pages_of_latents_and_kept_by_sae(at):
    w = at("#/latent/1", "document.querySelector('.actions')")
    w.run("localStorage.setItem('mmsae:query:another', JSON.stringify('#99'))")
    for j, button in ((1, "& and"), (3, "| or"), (2, "& not"), (4, "& and")):
        w.run(f"location.hash = '#/latent/{j}'")
        w.wait(f"document.querySelector('.number')?.textContent === '#{j}'")
        w.run(f"[...document.querySelectorAll('.actions button')].find(b => b.textContent === '{button}').click()")
    w.run("[...document.querySelectorAll('nav a')].find(a => a.textContent === 'Query').click()")
    w.wait("document.querySelector('input.query')?.value")
    assert w.run("document.querySelector('input.query').value") == "(#1 | #3) & ~#2 & #4"


def test_what_is_counted_is_outlined(at):
    w = at("#/query?q=count(%233)%20%3E%3D%202", "document.querySelectorAll('.sample .outlines').length > 3")
    shown = w.run("""mmsae.panel('main').then((p) => Promise.all([...document.querySelectorAll('.sample')]
        .filter((s) => s.href && s.querySelector('.outlines'))
        .map(async (s) => {
            const e = await p.find(s.href.split('/').pop());
            const [items, counts] = await p.areas(3);
            const starts = mmsae.areas((await p.maps(e)).image.get(3), p.meta.grid.image);
            return [counts[items.indexOf(e)], starts.areas.length];
        })))""")
    assert len(shown) > 3 and all(counted >= 2 and outlined >= 1 for counted, outlined in shown)
    first = w.run("document.querySelector('.slot .sample').href").split("/")[-1]
    uids, score, _ = scored(w, "#3")
    held = scored(w, "count(#3) >= 2")[2]
    assert first == max((s, -i, u) for i, (s, h, u) in enumerate(zip(score, held, uids, strict=True)) if h)[2]
    assert "samples whose patches the evidence has" in texts(w, ".hint")[0]
    w = at("#/query?q=%233", "document.querySelectorAll('.sample img').length > 3")
    assert w.run("document.querySelectorAll('.sample .outlines').length") == 0
