"""Pages of samples in a real browser: where latents fire in one, their areas, and how samples are found."""

import json

import numpy as np

from mmsae.interpret.evidence.folder import Evidence
from tests.helpers.browser import read
from tests.helpers.window import texts, type_


def test_areas_are_those_of_the_package(at):
    from mmsae.interpret.areas.connected import connected_areas

    w = at("#/", "document.querySelector('.tile')")
    rng = np.random.default_rng(0)
    for rows, cols in ((1, 1), (4, 4), (9, 14)):
        coarse = rng.random((8, -(-rows // 2), -(-cols // 2))).repeat(2, 1).repeat(2, 2)[:, :rows, :cols]
        maps = np.rint(255 * coarse * (coarse > 0.5)).astype(int)
        truth = connected_areas(maps.astype(np.float32))
        for i, one in enumerate(maps.reshape(len(maps), -1)):
            heat = {"position": np.flatnonzero(one).tolist(), "value": one[one > 0].tolist()}
            shape = {"rows": rows, "cols": cols, "places": rows * cols, "steps": []}
            found = w.run(f"mmsae.areas({json.dumps(heat)}, {json.dumps(shape)}).areas")
            own = truth.layer == i
            assert [a["size"] for a in found] == truth.size[own].tolist()
            assert np.allclose([a["box"] for a in found], truth.box[own]) if found else not own.any()


def test_a_sample_page_counts_areas_as_queries_do(window, tmp_path):
    from mmsae.interpret.areas.relations import CorpusAreas
    from mmsae.interpret.browser.command import explore
    from tests.helpers.evidence import write_evidence

    z = np.zeros((12, 6, 6, 3))
    z[:, :2, :2, 1] = 1
    z[:6, 4:, 3:, 1] = 0.8
    z[:, 5, 5, 2] = 1  # too small
    pixels = np.full((12, 24, 24, 3), 128, np.uint8)
    write_evidence(tmp_path / "e", {"image": z.reshape(12, 36, 3)}, images=pixels, grid={"image": (6, 6)})
    explore(str(tmp_path / "e"), out=str(tmp_path / "b"), progress=False)
    count = CorpusAreas.of_evidence(Evidence(tmp_path / "e"))
    shown = sorted(int(u, 16) for u in read(tmp_path / "b", "main/samples")["uid"])
    for i in (shown[0], shown[-1]):
        window.open("about:blank")
        until = "document.querySelectorAll('.where .map').length === 2"
        window.open(f"file://{tmp_path}/b/index.html#/sample/{i:032x}", until)
        said = texts(window, ".mapped .what")
        for j, says in ((1, "2 areas" if i < 6 else "1 area"), (2, "")):
            own = next(s for s in said if f"#{j}" in s)
            assert own.endswith(f"#{j}{says}") and count.count([j])[i] == (int(says[0]) if says else 0)
        window.run("document.querySelector('.where[data-latent=\"1\"]').click()")
        items = Evidence(tmp_path / "e").items
        assert texts(window, ".portrait h1") == [items.label[i] or items.key[i]]  # there are no captions
        item, areas = count.areas([1])
        share = round(100 * areas.size[item == i].sum() / 36)
        assert f"{'2 areas' if i < 6 else '1 area'}, {share} %" in texts(window, ".pinned .hint")[0]
    assert shown[0] < 6 <= shown[-1] and window.errors == []


def test_a_sample_shows_where_each_latent_fires(at, made):
    evidence = Evidence(made.parent / "evidence")
    w = at(f"#/sample/{evidence.items.uid[7]}", "document.querySelectorAll('.where .map').length > 1")
    latents = w.run("[...document.querySelectorAll('.where')].map(b => +b.dataset.latent)")
    assert set(latents) == set(evidence.codes("image").row(7)[0])
    for j in latents:
        w.run(f"document.querySelector('.where[data-latent=\"{j}\"]').click()")
        alpha = w.run("(c => [...c.getContext('2d').getImageData(0, 0, 4, 4).data].filter((_, i) => i % 4 === 3))"
                      "(document.querySelector('.pinned canvas.map'))")  # fmt: skip
        assert ((np.array(alpha) > 0) == (evidence.heat(7, j).ravel() > 0)).all()
        assert f"#{j}:" in w.run("document.querySelector('.pinned .hint').textContent")
    assert w.run("document.querySelectorAll('.pinned .outlines path').length") == 2
    w.run("document.querySelector('.where[data-latent=\"7\"]').click()")
    assert texts(w, ".portrait h1 .ticks") == [""]  # in the caption, too: this one fires in both


def test_samples_are_found_by_caption_label_and_key(at, made):
    w = at("#/samples/class%207", "document.querySelectorAll('.sample').length === 5")
    type_(w, "input.query", "word7 31")
    w.wait("document.querySelectorAll('.sample').length === 1")
    assert w.run("location.hash") == "#/samples/word7%2031"
    key = Evidence(made.parent / "evidence").items.key[31]
    w = at(f"#/samples/{key}", "document.querySelectorAll('.sample').length === 1")
    at("#/samples/", "document.querySelector('#page .hint').textContent.startsWith('60 samples')")
    w = at("#/?q=class%207", "document.querySelector('.tile')")  # a latent by the label of its samples
    assert "#7" in texts(w, ".tile .head small")
    w = at("#/?q=qqqq", "document.querySelector('.none').textContent.includes('No latent has “qqqq”')")
    assert texts(w, ".tile") == []
