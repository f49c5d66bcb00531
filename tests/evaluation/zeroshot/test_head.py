"""Zero-shot classification as a head: figures by hand, alpha from the tuning images alone, bad input."""

import pytest
import torch

from mmsae.evaluation.rows import find
from mmsae.evaluation.zeroshot.head import LabelledScores, zero_shot, zero_shot_head
from mmsae.evaluation.zeroshot.scores import accuracy, zero_shot_scores
from mmsae.types import Codes, InputError
from tests.helpers.zeroshot import ToySAE, task


def test_figures_are_those_of_the_formulas():
    x, labels, classes = task()
    r = zero_shot(ToySAE(), x, labels, classes, (x, labels))
    s = zero_shot_scores(ToySAE(), x, classes)
    s["enhanced"] = s["raw"] + r["alpha"] * s["code"]
    for kind, scores in s.items():
        others = (scores >= scores.gather(1, labels[:, None])).sum(1) - 1  # ties count against the label
        hit, five = (others < 1).double(), (others < 5).double()
        assert r[kind] == pytest.approx(hit.mean().item()) and r["top5"][kind] == pytest.approx(five.mean().item())
        own = torch.stack([hit[labels == c].mean() for c in labels.unique()])
        assert r["balanced"][kind] == pytest.approx(own.mean().item())
    assert list(r) == [*s, "alpha", "concept", "top5", "balanced", "tuning", "classes", "images"]
    assert (r["classes"], r["images"], r["concept"]) == (7, 200, "code")


def test_alpha_zero_equals_plain_exactly():
    x, labels, classes = task()
    r = zero_shot(ToySAE(), x, labels, classes, (x, labels), alphas=(0.0,))
    assert r["alpha"] == 0 and r["enhanced"] == r["raw"] and r["top5"]["enhanced"] == r["top5"]["raw"]


def test_alpha_comes_from_the_tuning_split_only():
    x, labels, classes = task()
    tune_x, tune_y, _ = task(seed=1)
    a = zero_shot(ToySAE(), x, labels, classes, (tune_x, tune_y))
    b = zero_shot(ToySAE(), x, (labels + 1) % 7, classes, (tune_x, tune_y))
    assert a["tuning"] == b["tuning"] and a["alpha"] == b["alpha"]
    best = max(a["tuning"].values())
    assert a["alpha"] == min(k for k, v in a["tuning"].items() if v == best)  # smallest among equals
    s = zero_shot_scores(ToySAE(), x, classes)
    assert a["raw"] == pytest.approx((s["raw"].argmax(1) == labels).double().mean().item())
    assert a["enhanced"] == pytest.approx(accuracy(s["raw"] + a["alpha"] * s["code"], labels))


def test_codes_help_when_they_know_the_class():
    x, labels, classes = task()

    class Oracle(ToySAE):  # codes carry the class of the nearest noise-free embedding
        def encode(self, x, modality=None):
            at = self.lookup[tuple(x.shape)]
            return Codes(torch.ones(len(x), 1), at[:, None], 10, modality)

    sae = Oracle()
    sae.lookup = {tuple(x.shape): labels, tuple(classes.shape): torch.arange(7)}
    r = zero_shot(sae, x, labels, classes, (x, labels))
    assert r["code"] == 1 and r["alpha"] == 2 and r["raw"] < r["enhanced"] <= 1


def test_balanced_accuracy_weighs_classes_equally():
    split = LabelledScores({"raw": torch.eye(3)[[0, 0, 0, 1]]}, torch.tensor([0, 0, 0, 2]))
    assert find(zero_shot_head(split, split).rows, score="balanced")[0]["value"] == 0.5


def test_bad_input():
    x, labels, classes = task()
    with pytest.raises(InputError, match="'codes'"):
        zero_shot(ToySAE(), x, labels, classes, (x, labels), concept="codes")
    with pytest.raises(InputError, match=r"\d+ of 200 tuning images have none of the 7 classes"):
        zero_shot(ToySAE(), x, labels, classes, (x, labels + 9 - labels.max()))
