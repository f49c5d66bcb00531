"""What the list of latents shows is in its address, so that it can be sent and gone back to."""

import json

import pytest

from tests.helpers.window import texts, type_

LISTED = "[...document.querySelectorAll('.tile')].map(t => +t.querySelector('.head small').textContent.slice(1))"
PRESSED = "document.querySelector('.chip[aria-pressed=true]').textContent"
THERE = "document.querySelectorAll('.tile').length"


def click(w, chip):
    w.run(f"[...document.querySelectorAll('.chip')].find(c => c.textContent.startsWith({json.dumps(chip)})).click()")


def brush(w):
    """Drag over the lower half of the first plot."""
    box = w.run("(r => [r.left, r.top, r.width, r.height])(document.querySelector('canvas').getBoundingClientRect())")
    w.mouse("mousePressed", box[0] + 46, box[1] + box[3] / 2)
    w.mouse("mouseMoved", box[0] + box[2] - 3, box[1] + box[3] - 25)
    w.mouse("mouseReleased", box[0] + box[2] - 3, box[1] + box[3] - 25)


def test_a_link_has_search_filter_and_order(at):
    w = at("#/?q=word&filter=text&order=text.density&up=1", THERE)
    up = w.run(LISTED)
    density = w.run("mmsae.panel('main').then((p) => [...p.columns['text.density']])")
    assert set(up) == {18, 19, 20, 21} and up == sorted(up, key=lambda j: (density[j], -j))
    assert w.run(PRESSED).startswith("Text only") and w.run("document.querySelector('input.search').value") == "word"
    assert w.run("document.querySelector('.tools select').value") == "text.density"
    w = at("#/?q=word&filter=text&order=text.density", THERE)
    assert w.run(LISTED) == up[::-1]


@pytest.mark.parametrize("column", ["purity", "agree"])
def test_latents_of_which_a_figure_is_unknown_come_last_either_way(at, column):
    figures = "mmsae.panel('main').then((p) => [...p.columns[%s]].map((v) => (Number.isNaN(v) ? null : v)))"
    known = [j for j, v in enumerate(at("#/", THERE).run(figures % json.dumps(column))) if v is not None]
    assert 0 < len(known) < 24
    order = "mmsae.panel('main').then((p) => p.orders.get(%s).all)"
    w = at(f"#/?order={column}&up=1", f"{THERE} && document.querySelector('.tools select').value === '{column}'")
    up = w.run(LISTED)
    assert set(w.run(order % json.dumps(column))[: len(known)]) == set(known)
    assert set(up[: min(len(up), len(known))]) <= set(known)


def test_every_choice_is_one_step_back(at):
    """Filter, order, its direction, an area, typed words: each is in the address, and the back button undoes it."""
    w = at("#/", THERE)
    seen = []

    def note():
        seen.append(w.run(f"[location.hash, {LISTED}, {PRESSED}, document.querySelector('.tools select').value]"))

    note()
    click(w, "Shared"), note()
    type_(w, ".tools select", "index", "change"), note()
    w.run("document.querySelector('.tools button[aria-label^=turn]').click()"), note()
    brush(w)
    w.wait("document.querySelector('.tools .hint').textContent.includes('in the chosen area')")
    note()
    for words in ("wor", "word", "word1"):  # letters of one search are one step
        type_(w, "input.search", words)
        w.wait(f"location.hash.includes('q={words}&')")
    note()
    first = ["#/", "#/?filter=shared", "#/?filter=shared&order=index", "#/?filter=shared&order=index&up=1"]
    assert [s[0] for s in seen[:4]] == first and seen[4][0].startswith(f"{first[3]}&area=image:")
    assert seen[2][1] == list(range(12)) and seen[3][1] == seen[2][1][::-1]
    inside = seen[4][1]
    assert 0 < len(inside) < 12 and inside == [j for j in seen[3][1] if j in inside]
    area = seen[4][0].split("&area=")[1]
    assert seen[5][0] == f"#/?q=word1&filter=shared&area={area}" and seen[5][3] == "relevance"
    for before in seen[-2::-1]:
        w.run("history.back()")
        w.wait(f"location.hash === {json.dumps(before[0])}")
        w.wait(f"JSON.stringify({LISTED}) === {json.dumps(json.dumps(before[1], separators=(',', ':')))}")
        assert w.run(f"[{PRESSED}, document.querySelector('.tools select').value]") == before[2:]
    assert w.run("document.querySelector('input.search').value") == ""
    again = at(seen[4][0], THERE)  # the area, too, opens by its address
    assert again.run(LISTED) == inside


def test_one_comes_back_to_the_list_as_it_was(at):
    """From a latent's page: by the back button, the key u and the link in the bar; to the same place of the list."""
    w = at("#/?filter=shared", THERE)
    w.run("document.querySelector('.virtual').scrollTop = 60")
    w.run("document.querySelector('.cover').click()")
    for back in ("history.back()", "document.querySelector('nav a').click()", ""):
        w.wait("document.querySelector('.number')")
        w.run(back) if back else w.key("u")
        w.wait("location.hash === '#/?filter=shared' && document.querySelector('.tile')")
        w.wait("document.querySelector('.virtual').scrollTop === 60")
        assert w.run(PRESSED).startswith("Shared")
        w.run("document.querySelector('.cover').click()")
    w.wait("document.querySelector('.number')")
    w.run("document.querySelector('.brand').click()")  # all of them
    w.wait(f"location.hash === '#/' && {PRESSED}.startsWith('All')")


@pytest.mark.parametrize(
    "path", ["#/?filter=none&order=nothing&area=elsewhere:0,1,0,1", "#/?area=map:0,x&order=relevance"]
)
def test_what_an_address_says_wrongly_is_left_out(at, path):
    w = at(path, THERE)
    assert texts(w, ".tools .hint")[0] == "24 latents"
    assert "order" in w.run("document.querySelector('.toast').textContent")


def test_searches_of_samples_and_queries_are_steps_back(at):
    for page, field in (("samples", "samples/word3"), ("query", "query?q=%233")):
        w = at(f"#/{page}", "document.querySelector('input.query')")
        for text in ("word", "word3") if page == "samples" else ("#", "#3"):
            type_(w, "input.query", text)
            w.wait(f"decodeURIComponent(location.hash).endsWith({json.dumps(text)})")
        assert w.run("location.hash") == f"#/{field}"
        w.wait("document.querySelectorAll('.sample img').length")
        w.run("history.back()")
        w.wait(f"location.hash === '#/{page}' && document.querySelector('input.query').value === ''")
