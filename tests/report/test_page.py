import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from markupsafe import Markup

from mmsae.metrics import text_keys, top_evidence
from mmsae.report import (
    Fact,
    Gallery,
    Section,
    Table,
    bar_chart,
    compare_codes,
    concept_cards,
    line_chart,
    names_of,
    render_report,
    shown_latents,
    thumbnail,
)
from mmsae.report.page import best_rows, number, prose
from mmsae.types import Codes, InputError

VOID = {"meta", "img", "br", "path", "use", "rect", "line", "link"}


class Page(HTMLParser):
    """Checks nesting; collects ids, references and images."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.refs, self.images, self.tags = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs, closed=False):
        a = dict(attrs)
        self.tags.append((tag, a))
        if "id" in a:
            self.ids.append(a["id"])
        for key in ("href", "xlink:href", "src", "clip-path", "style"):
            self.refs += re.findall(r"^#(.+)$|url\(#(.+?)\)", a.get(key) or "")
        if tag == "img":
            self.images.append(a)
        if not closed and tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs, closed=True)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, tag


def codes(rows):
    x = torch.tensor(rows)
    v, i = x.topk(x.shape[1], dim=1)
    return Codes(v, i, x.shape[1])


UIDS = [f"{i:032x}" for i in range(4)]
CAPTIONS = dict(zip(UIDS, ["a <red> disc", "a blue & square disc", "a <red> disc", "nothing"], strict=True))


@pytest.fixture
def tables():
    image = codes([[0.9, 0.0, 0.1], [0.2, 0.5, 0.0], [0.8, 0.0, 0.0], [0.0, 0.0, 0.3]])
    text = codes([[0.7, 0.0, 0.0], [0.0, 0.6, 0.0], [0.6, 0.1, 0.0], [0.1, 0.0, 0.0]])
    return {"image": top_evidence(image, UIDS), "text": top_evidence(text, UIDS)}


def image_of(uid):
    return None if uid == UIDS[2] else np.full((300, 200, 3), int(uid, 16), np.uint8)


def test_cards_show_top_samples_once_each(tables):
    corr = torch.tensor([0.8, float("nan"), 0.1])
    a, b = concept_cards([0, 2], tables, image_of, CAPTIONS, {0: "red"}, corr)
    assert (a.latent, a.name, b.name) == (0, "red", "")
    assert [p.value for p in a.images] == pytest.approx([0.9, 0.2])  # the one between them could not be loaded
    assert [c for c, _ in a.captions] == ["a <red> disc", "nothing"] and a.captions[0][1] == pytest.approx(0.7)
    assert a.facts == [("fires on images", "75.0%"), ("fires on texts", "75.0%"), ("image-text correlation", "0.80")]
    assert b.captions == [] and [p.alt for p in b.images] == ["nothing", "a <red> disc"]


def test_keys_by_caption_leave_room_for_other_captions():
    text = codes([[0.9, 0.0], [0.5, 0.0], [0.8, 0.0], [0.1, 0.0]])
    table = top_evidence(text, UIDS, n=3, key=text_keys([CAPTIONS[u] for u in UIDS]))
    (card,) = concept_cards([0], {"text": table}, image_of, CAPTIONS)
    assert [c for c, _ in card.captions] == ["a <red> disc", "a blue & square disc", "nothing"]


def test_shown_latents_are_alive_in_both_and_sorted(tables):
    assert shown_latents(tables, torch.tensor([0.2, 0.9, 1.0])) == [1, 0]
    assert shown_latents(tables, torch.tensor([float("nan"), 0.9, 1.0]), n=5) == [1, 0]


def test_names_of_keeps_good_matches_only():
    concepts = [
        {"name": "red", "latent": {"same": 3}, "f1": {"same": 0.7}},
        {"name": "disc", "latent": {"same": 3}, "f1": {"same": 0.9}},
        {"name": "big", "latent": {"same": 1}, "f1": {"same": 0.3}},
        {"name": "absent", "latent": {"same": 2}, "f1": {"same": float("nan")}},
    ]
    assert names_of(concepts) == {3: "disc / red"}


def test_a_thumbnail_shrinks_and_says_when_it_is_tiny():
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image

    big = thumbnail(np.zeros((300, 200, 3), np.uint8), "x", size=120)
    small = thumbnail(torch.ones(3, 8, 8), "y")
    sizes = [Image.open(BytesIO(b64decode(p.uri.split(",")[1]))).size for p in (big, small)]
    assert sizes == [(80, 120), (8, 8)] and (big.tiny, small.tiny) == (False, True)


def test_compare_codes_puts_shared_latents_first():
    p = compare_codes(codes([[0.5, 0.0, 2.0, 0.1]]), codes([[1.0, 0.3, 0.0, 0.4]]), "Pair", "text", names={0: "red"})
    assert [b.label for b in p.bars] == ["#0 red", "#3", "#2", "#1"]
    assert [b.shared for b in p.bars] == [True, True, False, False]
    assert (p.bars[0].image, p.bars[0].text, p.bars[2].image) == (0.25, 0.5, 1.0)
    assert p.cosine == pytest.approx((0.5 + 0.04) / (4.26**0.5 * 1.25**0.5), abs=1e-6)
    empty = codes([[0.0, 0.0]])
    assert compare_codes(empty, empty, "t", "c").bars == []


def test_compare_codes_of_signed_codes_ranks_by_size_and_says_the_signs():
    p = compare_codes(codes([[0.5, 0.0, -2.0]]), codes([[-1.0, 0.3, 0.0]]), "Pair", "text")
    assert [b.label for b in p.bars] == ["#0", "#2", "#1"] and [b.shared for b in p.bars] == [True, False, False]
    assert (p.bars[0].image, p.bars[0].text, p.bars[0].text_value, p.bars[1].image) == (0.25, 0.5, -1.0, 1.0)


@pytest.mark.parametrize(
    "value,want",
    [(0.12345, "0.123"), (1, "1"), (12345, "12,345"), (2e-5, "2.0e-05"), (0.0, "0.000"), (None, "–"),
     (float("nan"), "–"), ("x", "x"), (True, "True"), (12345.6, "12,346"), (-0.5, "-0.500")],
)  # fmt: skip
def test_numbers(value, want):
    assert number(value) == want


def test_best_cells():
    t = Table(
        ["m", "fvu", "r"], [["a", 0.1, 0.5], ["b", 0.2, 0.7001], ["c", None, 0.70012]], best={"fvu": "min", "r": "max"}
    )
    assert best_rows(t) == {1: {0}, 2: {1, 2}}  # what prints alike is marked alike
    with pytest.raises(InputError, match="'f1'"):
        best_rows(t._replace(best={"f1": "max"}))


def test_prose_escapes_and_marks_up():
    html = prose("a < b, **bold** and *em* with 2*3*4 in `x*y*z`\nsame line\n\n- one\n- <two>")
    assert html == (
        "<p>a &lt; b, <strong>bold</strong> and <em>em</em> with 2*3*4 in <code>x*y*z</code> same line</p>\n"
        "<ul><li>one</li><li>&lt;two&gt;</li></ul>"
    )
    assert prose(Markup("<b>x</b>")) == "<b>x</b>" and prose("") == ""


def test_report_is_whole_self_contained_and_accessible(tmp_path, tables):
    cards = concept_cards([0, 1, 2], tables, image_of, CAPTIONS)
    image, text = codes([[0.5, 0.1, 2.0]]), codes([[1.0, 0.3, 0.0]])
    curves = {"a": ([0, 1, 2], [1.0, 0.5, 0.2]), "b": ([0, 1, 2], [1.0, 0.7, 0.4])}
    charts = [
        line_chart({"FVU": curves, "L0": curves}, x_label="step", caption="Curves", log_y=True),
        bar_chart({"a": {"x": 1, "y": 2}, "b": {"x": 2, "y": 3}}, y_label="F1", lines={"chance": 0.5}),
        bar_chart({"a": {"x": 1, "y": 2}, "b": {"x": 2, "y": 3}}, y_label="share", stacked=True),
    ]
    pair = compare_codes(image, text, "Matched pair", "a <red> disc", np.zeros((8, 8, 3), np.uint8))
    sections = [
        Section("Summary", "Text & <script>", facts=[Fact("R@1", 0.5, "note")], warnings=["look <here>"]),
        Section("Numbers", tables=[Table(["m", "v"], [["a", 1.0], ["b", 2.0]], "cap", {"v": "max"})], figures=charts),
        Section("Concepts", galleries=[Gallery(cards, "Top")], pairs=[pair]),
    ]
    path = tmp_path / "r.html"
    assert render_report(path, "Title <1>", sections, lead="hello", meta={"seed": 0}, data={"x": "</pre>"}) == path
    html = path.read_text()
    page = Page(html)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"] and html.startswith("<!doctype html>")
    assert len(page.ids) == len(set(page.ids)) and page.refs
    assert {a or b for a, b in page.refs} <= set(page.ids)
    assert "<script" not in html and not re.search(r"(src|href)=\"(?!#|data:)", html) and "@import" not in html
    assert len(page.images) == 6 and all(i["alt"] for i in page.images)
    assert "a &lt;red&gt; disc" in html and "Title &lt;1&gt;" in html and "look &lt;here&gt;" in html
    charts = [a for tag, a in page.tags if tag == "svg"]
    assert len(charts) == 3 and all(a["role"] == "img" and a["aria-label"] for a in charts)
    assert "currentcolor" in html.lower() and "#010203" not in html and "#000000" not in html
    assert "font-size: 10.5px" in html and "DejaVu" not in html
    assert 'class="best"' in html and "prefers-color-scheme:dark" in html


def test_report_is_reproducible_and_empty_parts_leave_nothing(tmp_path):
    chart = lambda: line_chart({"p": {"a": ([0, 1], [1.0, 2.0])}}, x_label="step")  # noqa: E731
    a, b = (render_report(tmp_path / f"{i}.html", "t", [Section("s", figures=[chart()])]).read_text() for i in "ab")
    assert a == b
    bare = Page(render_report(tmp_path / "c.html", "t", [Section("only")]).read_text())
    assert not {"nav", "table", "figure", "details"} & {tag for tag, _ in bare.tags}
