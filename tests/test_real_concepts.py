"""benchmarks/real_concepts.py and concept_filter.py: which latents are shown, the figure, and queries that clean."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mmsae.evaluation.card.card  # noqa: F401  it registers the heads
from mmsae import load_pair
from mmsae.evaluation.card.top_images import Purity
from mmsae.evaluation.options import EvaluationRun
from mmsae.evaluation.suite import parse_suite
from mmsae.evaluation.suite_data import SuiteData
from mmsae.metrics.concepts.query import evaluate
from mmsae.types import IMAGE, Codes
from tests.helpers.evaluation import save_host, save_sae, write_colours

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import concept_filter
        import real_concepts

        yield real_concepts, concept_filter


def test_the_best_are_one_a_class_and_the_ordinary_are_in_the_middle(benchmark):
    labels = torch.arange(40) % 4
    dense = torch.zeros(40, 12)
    for j in range(10):  # latent j: nine images, of which 9 - j // 2 are of class j % 4
        own, other = (labels == j % 4).nonzero()[:, 0], (labels != j % 4).nonzero()[:, 0]
        n = 9 - j // 2
        dense[torch.cat([own[:n], other[: 9 - n]]), j] = 1.0
    found = benchmark[0].ranked(Codes(dense, None, 12, IMAGE), labels)
    assert len(found.order) == 10 and {10, 11}.isdisjoint(found.order)  # two are silent
    best = found.chosen("best", 4)
    assert len(best) == 4 and sorted(found.purity.label[best].tolist()) == [0, 1, 2, 3]
    counts = found.purity.count[found.order].tolist()
    assert counts == sorted(counts, reverse=True) and found.chosen("median", 4) == found.order[3:7]
    assert isinstance(found.purity, Purity)


def test_the_figure_is_drawn(benchmark, tmp_path):
    host = save_host(tmp_path / "host")
    sae = save_sae(tmp_path / "sae", host, "visual.transformer.resblocks.1:out[patches]")
    sets = dict.fromkeys(("train", "test"), write_colours(tmp_path / "test", 60, 2, "test"))
    suite = parse_suite({"data": sets, "label": "class", "heads": ["core"]})
    model, loaded = load_pair(sae, device="cpu")
    data, shapes = SuiteData(suite, model, loaded, EvaluationRun(progress=False)), []
    for layout in (benchmark[0].FIGURE, benchmark[0].GALLERY):
        path = tmp_path / "figure.png"
        said = benchmark[0].figure(data, path, layout)
        assert set(said) == {"SAE", "random"} and said["SAE"]["photographs"] == 60
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        shapes.append(pixels.shape[:2])
        assert path.stat().st_size < 400_000
        red = (pixels[..., 0] > 100) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)
        assert red.mean() > 0.01  # the photographs are in it
    assert shapes[0][1] > 3 * shapes[0][0] / 2 and shapes[1][0] > 2 * shapes[0][0]


def test_a_query_is_made_of_the_concepts_that_tell_a_class_and_cleans_other_images(benchmark):
    filtering, rng = benchmark[1], np.random.default_rng(0)

    def made(n):
        planted = rng.random(n) < 0.25
        half = planted & (rng.random(n) < 0.5)
        dense = rng.random((n, 8)).astype(np.float32) * (rng.random((n, 8)) < 0.2)
        dense[:, 3] = np.where(half, 2 + rng.random(n), 0)
        dense[:, 5] = np.where(planted & ~half, 2 + rng.random(n), 0)
        return filtering.Values(dense), planted

    (train, true), (test, planted) = made(400), made(300)
    query = filtering.query_of(train, true)
    assert set(query.replace("(", "").replace(")", "").split(" | ")) == {"#3", "#5"}
    keeps = evaluate(f"~({query})", {IMAGE: test}, calibration={IMAGE: train}, holds=True)
    assert filtering.cleaned(~keeps, planted) == {"precision": 1.0, "recall": 1.0, "F1": 1.0}
    assert filtering.cleaned(np.zeros(300, bool), planted)["F1"] == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_kind_has_a_row_for_every_class_and_the_table_is_of_their_means(benchmark):
    filtering, rng = benchmark[1], np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(60, 4)).astype(np.float32))
    classes = np.array(["a", "b"] * 15)
    x[:, 0] += torch.from_numpy(np.repeat(np.where(classes == "a", 3.0, -3.0), 2)).float()
    sets = {"train": (x, torch.arange(30).repeat_interleave(2), classes)}
    sets["test"] = sets["train"]
    rows = filtering.run(sets, {"raw channels": filtering.channels})
    assert {(r["class"], r["features"]) for r in rows} == {
        (c, k) for c in "ab" for k in ("raw channels", "linear probe", "nothing removed")}  # fmt: skip
    lines = filtering.table([{"seed": 0, **r} for r in rows]).splitlines()
    assert lines[2].startswith("| raw channels | ") and lines[3].startswith("| linear probe | 1.000 | 1.000 | 1.000")
    assert yaml.safe_load(f"[{lines[2].strip('|').replace('|', ',')}]")[3] > 0.95
