"""The browser in a real one: pages, keys, texts that try to be markup."""

import json

import numpy as np
import pytest

from mmsae.interpret.evidence.folder import Evidence
from mmsae.metrics.statistics import wilson
from tests.helpers.browser import HOSTILE, browser
from tests.helpers.window import texts, type_


def test_overview(at):
    w = at("#/", "document.querySelectorAll('.tile').length > 5")
    assert "All24" in texts(w, ".chip") and "Dead2" in texts(w, ".chip") and "Shared12" in texts(w, ".chip")
    w.run("[...document.querySelectorAll('.chip')].find(c => c.textContent.startsWith('Text only')).click()")
    w.wait("document.querySelectorAll('.tile').length === 4")
    w.run("document.querySelectorAll('.tools .segmented button')[1].click()")
    assert len(texts(w, ".virtual .row")) == 4


def test_brushing_chooses_latents(at):
    w = at("#/", "document.querySelectorAll('.tile').length > 5")
    box = w.run("(r => [r.left, r.top, r.width, r.height])(document.querySelector('canvas').getBoundingClientRect())")
    w.mouse("mousePressed", box[0] + 46, box[1] + 5)
    w.mouse("mouseMoved", box[0] + box[2] - 3, box[1] + box[3] - 25)
    w.mouse("mouseReleased", box[0] + box[2] - 3, box[1] + box[3] - 25)
    chosen = "document.querySelector('.tools .hint')?.textContent.includes('18 latents in the chosen area')"
    w.wait(chosen)
    w.run("document.querySelector('.cover').click()")
    w.wait("document.querySelector('.number')")
    w.run("history.back()")
    w.wait(chosen)  # and still
    w.run("document.querySelector('.tools .hint button').click()")
    w.wait("document.querySelector('.tools .hint').textContent === '24 latents'")


@pytest.mark.parametrize(("words", "first"), [("word7", 7), ("zero", 0), ("#21", 21)])
def test_search(at, words, first):
    w = at(f"#/?q={words.replace('#', '%23')}", "document.querySelector('.tile')")
    assert texts(w, ".tile .head small")[0] == f"#{first}"


def test_latent_page_and_keys(at, made):
    w = at("#/latent/3", "document.querySelectorAll('.side .shot img').length > 3")
    assert w.run("document.querySelector('.number').textContent") == "#3"
    assert w.run("document.querySelectorAll('canvas.map').length") > 3
    assert any("word3" in t for t in texts(w, ".side.text .words"))
    w.key("h"), w.key("h")
    assert w.run("document.querySelectorAll('canvas.map').length") == 0
    w.key("h"), w.key("j")
    w.wait("document.querySelector('.number').textContent === '#4'")
    w.key("k")
    w.wait("document.querySelector('.number').textContent === '#3'")
    w.key("b")
    assert w.run("document.querySelector('.title .star').textContent") == "★"
    w.key("?")
    w.wait("document.querySelector('dialog[open]')")


def test_a_map_lies_where_the_codes_are(at, made):
    w = at("#/latent/3", "document.querySelector('.side .shot canvas.map')")
    evidence = Evidence(made.parent / "evidence")
    heat = evidence.heat(int(evidence.top("image").item[3, 0]), 3)
    alpha = w.run("(c => [...c.getContext('2d').getImageData(0, 0, 4, 4).data].filter((_, i) => i % 4 === 3))"
                  "(document.querySelector('.side .shot canvas.map'))")  # fmt: skip
    assert (np.argsort(alpha)[-1] == heat.argmax()) and ((np.array(alpha) > 0) == (heat.ravel() > 0)).all()


def test_dead_latent_and_wrong_addresses(at):
    w = at("#/latent/23")
    assert "Dead." in w.run("document.querySelector('#page').textContent")
    for path, says in (
        ("#/latent/999", "no latent 999"),
        ("#/sample/nowhere", "not in this browser"),
        ("#/nothing", "no page"),
    ):
        w = at(path, f"document.querySelector('#page').textContent.includes({json.dumps(says)})")


def test_hostile_texts_stay_texts(at, made):
    evidence = Evidence(made.parent / "evidence")
    for i, said in enumerate(HOSTILE):
        w = at(f"#/sample/{evidence.items.uid[i]}", "document.querySelector('.portrait .caption')")
        assert w.run("document.querySelector('.portrait .caption').textContent") == f"{said} word{i}"
        assert w.run("document.title").startswith(said[:5]) and w.run("document.title") != "owned"
    w = at("#/latent/2", "document.querySelector('input.rename')")
    assert w.run("document.querySelector('input.rename').value") == HOSTILE[1]
    assert w.run("document.querySelectorAll('#page script, #page [onerror]').length") == 0


def test_names_of_a_person_are_kept_saved_and_read_back(at, made, tmp_path):
    from mmsae.metrics.concepts.names import read_names

    w = at("#/latent/5", "document.querySelector('input.rename')")
    type_(w, "input.rename", "my name", "change")
    w = at("#/latent/5", "document.querySelector('input.rename')?.value === 'my name'")
    (tmp_path / "names.json").write_text(w.run("mmsae.panel('main').then((p) => mmsae.notes.toNames(p))"))
    names = read_names(tmp_path / "names.json", "s" * 32)
    assert (names[5].name, names[5].method) == ("my name", "person") and names[0].name == "word zero"
    assert names[1].name is None and names[2].name == HOSTILE[1]
    other = json.dumps({"format": 1, "sae": "t" * 32, "names": {}})
    said = w.run(f"""mmsae.panel('main').then((p) => {{
        try {{ mmsae.notes.fromNames(p, {json.dumps(other)}) }} catch (e) {{ return e.message }}
    }})""")
    assert "names of SAE tttttttttttt" in said
    w.run("mmsae.panel('main').then((p) => mmsae.notes.rename(p, 5, ''))")


def test_the_intruder_is_silent_and_the_csv_says_who_was_right(at, made):
    w = at("#/intruder", "document.querySelector('form.start')")
    w.run("(f => { f.trials.value = 3; f.querySelector('button').click(); })(document.querySelector('form.start'))")
    for _ in range(3):
        w.wait("document.querySelectorAll('.choice img').length === 6")
        w.key("2")
        w.run("new Promise((r) => setTimeout(r, 100))")
    w.wait("document.querySelector('.stage table')")
    ends = [wilson(k, 3) for k in (0, 1, 3)]
    assert np.abs(np.array(w.run("[0, 1, 3].map((k) => mmsae.wilson(k, 3).slice(1))")) - ends).max() < 1e-6
    assert w.run("[mmsae.wilson(0, 3)[1], mmsae.wilson(3, 3)[2]]") == [0, 1]
    rows = [r.split(",") for r in w.run("mmsae.intruderCsv()").strip().splitlines()]
    evidence = Evidence(made.parent / "evidence")
    assert len(rows) == 4
    for row in rows[1:]:
        r = dict(zip(rows[0], row, strict=True))
        items = [int(u, 16) for u in r["items"].split()]
        fires = [int(r["latent"]) in evidence.codes(r["modality"]).row(i)[0] for i in items]
        assert fires.index(False) == int(r["intruder"]) and sum(fires) == 5 and r["answer"] == "1"
        assert (r["right"] == "true") == (r["intruder"] == "1")


def test_panels_are_saved_as_pictures(at):
    w = at("#/latent/3", "document.querySelector('.side .shot img')")
    kinds = w.run("""(async () => {
        const saved = [];
        mmsae.save = (name, content, type) =>
          saved.push([name, content instanceof Blob ? content.type : type, content.size ?? content.length]);
        const panel = await mmsae.panel("main");
        const record = await panel.latent(3);
        await mmsae.exportPanel(panel, record, "svg");
        await mmsae.exportPanel(panel, record, "png");
        return saved;
    })()""")
    assert [k[:2] for k in kinds] == [["latent-3.svg", "image/svg+xml"], ["latent-3.png", "image/png"]]
    assert all(k[2] > 2000 for k in kinds)


def test_blurred_and_without_images(at, window, tmp_path):
    from mmsae.interpret.browser.options import Display

    for images in ("blur", "none"):
        folder, _ = browser(tmp_path / images, display=Display(images=images))
        window.open(f"file://{folder}/index.html#/latent/3", "document.querySelector('.side')")
        window.run("new Promise((r) => setTimeout(r, 200))")
        assert window.run("document.body.classList.contains('blur')") == (images == "blur")
        assert (window.run("document.querySelectorAll('img').length") > 0) == (images == "blur")
        window.requests.clear()


def test_search_by_concept_vectors(window, tmp_path, monkeypatch):
    from mmsae.interpret.browser.command import explore
    from mmsae.interpret.browser.options import Display
    from tests.helpers.evidence import write_evidence

    rng = np.random.default_rng(0)
    concept = np.arange(60) % 5
    z, e = np.eye(5)[concept][:, None], rng.normal(size=(5, 8))[concept] + 0.1 * rng.normal(size=(60, 8))
    said = [f"a {'red blue cat dog tree'.split()[c]}" for c in concept]
    write_evidence(tmp_path / "e", {"image": z, "text": z}, captions=said, embeddings={"image": e, "text": e})
    explore(str(tmp_path / "e"), out=str(tmp_path / "b"), progress=False)
    window.open("about:blank")
    window.open(f"file://{tmp_path}/b/index.html#/?q=like%20dog", "document.querySelector('.tile')")
    assert texts(window, ".tile .head small")[0] == "#3"
    assert window.run("mmsae.panel('main').then((p) => mmsae.search(p, 'like #4')[0])") == 4
    assert window.run("mmsae.panel('main').then((p) => mmsae.search(p, 'like dog - dog + cat')[0])") == 2

    class Reads:
        """A host to which a phrase is something else than its words."""

        name, reads_text, knows_words = "toy", True, True

        def phrases(self, phrases, templates):
            middle = e.reshape(12, 5, 8).mean(0)
            return middle[[{"red": 0, "dog": 3, "red dog": 4, "tree": 1}[p] for p in phrases]].astype(np.float32)

    monkeypatch.setattr("mmsae.interpret.browser.vectors.Embedder.of", lambda *args, **options: Reads())
    (tmp_path / "words.txt").write_text("red\ndog\nred dog\ntree\n")
    display = Display(vocabulary=str(tmp_path / "words.txt"))
    explore(str(tmp_path / "e"), out=str(tmp_path / "c"), progress=False, display=display)
    window.open(f"file://{tmp_path}/c/index.html#/?q=like%20red%20dog", "document.querySelector('.tile')")
    assert texts(window, ".tile .head small")[0] == "#4"  # the longest phrase that is known
    for said, latent in (("dog", 3), ("tree", 1), ("nothing red dog - tree", 4), ("#3 - #3 + red", 0)):
        assert window.run(f"mmsae.panel('main').then((p) => mmsae.search(p, 'like {said}')[0])") == latent


def test_several_panels(window, tmp_path):
    """Comparison, a marked control, the ontology, strips and attributes in one browser."""
    from mmsae.interpret.attributes.file import write_attributes
    from mmsae.interpret.browser.options import Pages
    from mmsae.steering.methods.attributes import Attribute
    from tests.helpers.browser import planted

    planted(tmp_path / "other", seed=0)
    planted(tmp_path / "control", seed=5, d_sae=30, sae="r" * 32)
    (tmp_path / "tree.tsv").write_text("".join(f"class {i}\t{'even' if i % 2 == 0 else 'odd'}\n" for i in range(12)))
    rate = {"asked": 10, "confirmed": 1, "low": 0.02, "high": 0.4}
    found = {3: [Attribute("red", 0.1, 4.0, 5.0)], 4: []}
    write_attributes(tmp_path / "a.json", found, "s" * 32, rates={"features": rate, "directions": rate})
    pages = Pages(tree=str(tmp_path / "tree.tsv"), attributes=str(tmp_path / "a.json"))
    more = {"other": str(tmp_path / "other"), "control": str(tmp_path / "control")}
    folder, _ = browser(tmp_path, pages=pages, **more)
    window.forget()
    seen = {
        "#/compare": "document.querySelector('.tile-button b').textContent === '22'",  # all living ones: it is the same
        "#/control/latent/28": "document.querySelector('.warning').textContent.startsWith('Control.')",
        "#/control/": "document.querySelector('.warning') && document.querySelectorAll('.tile').length > 3",
        "#/tree": "document.querySelectorAll('.tree .node').length > 3",
        "#/attributes": "document.querySelector('tbody tr').textContent.includes('red')"
        " && document.querySelector('#page').textContent.includes('of 1 of 10 (2.0 % to 40 %) random directions')",
        "#/latent/3": "document.querySelector('.facts').textContent.includes('Sets in images')"
        " && document.querySelector('.facts a[href=\"#/other/latent/3\"]')",  # its like in the same SAE is itself
    }
    for path, until in seen.items():
        window.open("about:blank")
        window.open(f"file://{folder}/index.html{path}", until)
    assert window.errors == []
    view = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    window.send("Emulation.setDeviceMetricsOverride", **view)
    try:
        for path, until in seen.items():
            window.open("about:blank")
            window.open(f"file://{folder}/index.html{path}", until)
            assert window.run("document.documentElement.scrollWidth") <= 390, path
            assert window.run("document.querySelector('#page').scrollWidth") <= 390, path
        window.open(f"file://{folder}/index.html#/", "document.querySelector('.tile')")
        window.run("document.querySelector('.unfold').click()")
        window.wait("document.querySelector('.scatter canvas').clientWidth > 200")
        ends = "['.plots', '.results'].map(s => document.querySelector(s).getBoundingClientRect())"
        assert window.run(f"(([a, b]) => a.bottom <= b.top)({ends})")  # nothing lies over the list
        assert window.run("document.querySelector('#page').scrollWidth") <= 390
    finally:
        window.send("Emulation.setDeviceMetricsOverride", **view | {"width": 1440, "height": 900})


@pytest.mark.slow
def test_16384_latents_are_seen_and_searched_fast(window, tmp_path):
    """First view under 2 s, search under 100 ms, under 400 MB and under 60 MB without images."""
    from benchmarks.browser import meta_of, seen, write_large
    from mmsae.interpret.browser.command import explore
    from mmsae.interpret.browser.options import Display

    write_large(tmp_path / "e", 16384, 20000)
    made = explore(str(tmp_path / "e"), out=str(tmp_path / "b"), progress=False, display=Display(top=9))
    images = meta_of(tmp_path / "b")["bytes"]["images"]
    assert made["bytes"] < 400e6 and made["bytes"] - images < 60e6
    window.forget()
    found = seen(window, tmp_path / "b")
    assert found["first"] < 2 and found["search"] < 100, found
    outside = [r for r in window.requests if not r.startswith((f"file://{tmp_path}/b/", "data:", "about:"))]
    assert window.errors == [] and outside == []


def test_words_of_texts_steps_of_denoisers_and_own_grids(window, tmp_path):
    from safetensors.numpy import load_file, save_file

    from mmsae.interpret.browser.command import explore
    from tests.helpers.evidence import write_evidence

    n, folder = 12, tmp_path / "e"
    image, text = np.zeros((n, 2 * 4, 3)), np.zeros((n, 4, 3))
    image[:, 0, 1], image[:, 4 + 3, 1] = 1, 0.5  # the first place at the first step, the last one at the second
    text[:, 2, 1] = 1
    pixels = np.full((n, 16, 16, 3), 128, np.uint8)
    write_evidence(
        folder, {"image": image, "text": text}, captions=["a red dog"] * n, images=pixels, grid={"image": (2, 2)}
    )
    about = json.loads((folder / "evidence.json").read_text())
    about["grid"]["image"] |= {"places": 4, "steps": [0, 7]}
    (folder / "evidence.json").write_text(json.dumps(about))
    tokens = load_file(folder / "tokens-image.safetensors")
    tokens["grid"] = np.tile(np.int32([2, 2]), (len(tokens["item"]), 1))
    tokens["grid"][0] = 1, 4  # of one item
    save_file(tokens, folder / "tokens-image.safetensors")
    pieces = ["a", " red", " dog"]
    words = {"item": tokens["item"], "start": np.arange(0, 3 * n + 1, 3), "position": np.tile(np.int32([1, 2, 3]), n),
             "size": np.tile(np.int32([1, 4, 4]), n), "first": np.arange(0, 9 * n + 1, 9),
             "bytes": np.frombuffer("".join(pieces).encode() * n, np.uint8)}  # fmt: skip
    save_file({k: np.ascontiguousarray(v) for k, v in words.items()}, folder / "words-text.safetensors")
    explore(str(folder), out=str(tmp_path / "b"), progress=False)
    window.forget()
    window.open(f"file://{tmp_path}/b/index.html#/latent/1", "document.querySelectorAll('.shot canvas.map').length > 3")
    assert texts(window, ".side.text .words mark")[0] == " red"
    assert texts(window, ".side.text .words")[0].startswith("a red dog")
    alpha = """[...document.querySelectorAll('.shot canvas.map')].slice(0, 2).map((c) => {
        const pixels = [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data];
        return [c.width, c.height, pixels.filter((_, i) => i % 4 === 3).map((x) => x > 0)];
    })"""
    first = [[4, 1, [True, False, False, False]], [2, 2, [True, False, False, False]]]
    assert window.run(alpha) == first
    window.run("document.querySelectorAll('.profile button')[1].click()")
    assert window.run(alpha) == [[w, t, on[::-1]] for w, t, on in first]
    assert window.run("document.querySelector('.steps b').textContent") == "step 7"
    window.open("about:blank")
    window.open(f"file://{tmp_path}/b/index.html#/sample/{1:032x}", "document.querySelector('.pinned canvas.map')")
    assert "at step 0" in texts(window, ".pinned .hint")[0]  # where it fires most
    assert texts(window, ".portrait h1 mark") == [" red"] and window.errors == []


def test_strips_are_on_the_page_of_their_latent(window, tmp_path):
    import torch

    from mmsae.interpret.browser.options import Pages
    from mmsae.steering.job import _save_images
    from mmsae.steering.measure.sweep import UNSTEERED, Item

    run = tmp_path / "steer"
    (run / "parts").mkdir(parents=True)
    shade = {(UNSTEERED, 0.0, -1): 0.1, ("#3", 2.0, -1): 0.5, ("#3", 2.0, 0): 0.9}
    images = {k: {Item(HOSTILE[0], 1): torch.full((3, 8, 8), v)} for k, v in shade.items()}
    _save_images(images, run / "parts" / "0.safetensors")
    job = {"sae": "s" * 32, "prompts": [HOSTILE[0]], "how": {"features": [3]}, "gates": {"unit": "x_max"}}
    (run / "results.json").write_text(json.dumps({"name": "#3", "job": job}))
    folder, _ = browser(tmp_path, pages=Pages(strips=(str(run),)))
    window.forget()
    window.open(f"file://{folder}/index.html#/latent/3", "document.querySelectorAll('.strips img').length === 4")
    assert texts(window, ".strips tbody th")[0] == HOSTILE[0]
    assert texts(window, ".strips thead th") == ["", "unsteered", "2"] and window.errors == []
    window.open("about:blank")
    window.open(f"file://{folder}/index.html#/latent/4", "document.querySelector('.side')")
    assert texts(window, ".strips") == []


def test_the_keyboard_reaches_what_the_mouse_does(at):
    w = at("#/", "document.querySelectorAll('.tile').length > 5")
    here = "document.activeElement.closest('.slot')?.querySelector('.head small').textContent"
    w.key("j"), w.key("j")
    first = w.run(here)
    w.key("ArrowDown")
    below = w.run(here)
    w.key("ArrowUp")
    assert w.run(here) == first != below
    w.run("document.querySelector('.tools .segmented button').focus()")
    w.run("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', bubbles: true }))")
    assert w.run("location.hash") == "#/"  # a button is pressed, and nothing opened
    w.key("/")
    w.run("document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowDown', bubbles: true }))")
    opened = w.run(here)
    w.run("document.activeElement.click()")
    w.wait("document.querySelector('.number')?.textContent === " + json.dumps(opened))
    w.wait("document.activeElement.id === 'page'")  # where arrows scroll
    w.key("n")
    assert w.run("document.activeElement.className") == "rename"
    name = w.run("document.activeElement.value")
    w.key("Escape"), w.key("ArrowDown")
    assert w.run("[document.querySelector('.number').textContent, document.querySelector('input.rename').value]") == [
        opened,
        name,
    ]
    w.key("u")
    w.wait("document.querySelector('.overview')")
    w.run("document.querySelector('.skip').click()")
    assert w.run("[document.activeElement.id, location.hash]") == ["page", "#/"]


def test_numbers_read_as_a_person_writes_them(at):
    w = at("#/about")
    numbers = [0, 12345.6, 12, -0.0012, 0.0049, 0.005, 0.25, 1e-5, 9.999, 54.321, 123.45]
    said = ["0", "12,346", "12", "-0.001", "0.005", "0.01", "0.25", "1.0e-5", "10", "54.32", "123.5"]
    assert w.run(f"{numbers}.map((x) => mmsae.number(x, 2))") == said


def test_the_order_turns_around(at):
    w = at("#/", "document.querySelectorAll('.tile').length > 5")
    type_(w, ".tools select", "index", "change")
    assert texts(w, ".tile .head small")[0] == "#0"
    w.run("document.querySelector('.tools button[aria-label^=turn]').click()")
    assert texts(w, ".tile .head small")[0] == "#23"


def test_many_points_are_painted_where_they_are(at):
    """More points than are drawn as circles: the pixel of each has its colour, whatever the scale of the screen."""
    w = at("#/about")
    found = w.run("""(() => {
        const x = Float32Array.from({ length: 3600 }, (_, i) => (i % 60 < 30 ? i % 60 : NaN));
        const y = Float32Array.from({ length: 3600 }, (_, i) => Math.floor(i / 60) + 1);
        const plots = [1, 2].map((times) => {
            const x2 = Float32Array.from({ length: 3600 * times }, (_, i) => x[i % 3600]);
            const y2 = Float32Array.from({ length: 3600 * times }, (_, i) => y[i % 3600]);
            const kind = Uint8Array.from(x2, (v) => +(v >= 15));
            const s = mmsae.scatter({ x: x2, y: y2, kind, tones: ["--image", "--text"], axes: null, label: "x" });
            Object.assign(s.style, { width: "600px", height: "600px", display: "block" });
            Object.assign(s.canvas.style, { width: "600px", height: "600px" });
            document.querySelector("#page").append(s);
            s.draw();
            return s;
        });
        const colour = (s, a, b) => {
            const at = (v, lo, hi) => 6 + ((v - (lo - 0.04 * (hi - lo))) / (1.08 * (hi - lo))) * 588;
            const [left, top] = [at(a, 0, 29), 600 - at(b, 1, 60)].map(Math.round);
            return [...s.canvas.getContext("2d").getImageData(left, top, 1, 1).data];
        };
        return plots.map((s) => [colour(s, 2, 3), colour(s, 20, 50), colour(s, 2.5, 3.5)]);
    })()""")
    css = w.run("['--image', '--text'].map(c => getComputedStyle(document.documentElement).getPropertyValue(c).trim())")
    colours = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in css]
    for left, right, between in found:
        assert np.abs(np.array([left[:3], right[:3]]) - colours).max() < 6 and min(left[3], right[3]) > 80
        assert between[3] == 0
