"""The measures and tasks on a real SAE, random weights: they take its codes as they come, gradients included."""

import pytest
import torch

from mmsae import SAE
from mmsae.evaluation.zeroshot.head import zero_shot
from mmsae.filtering.truth import Side, mismatch
from mmsae.metrics import PairScorer, concept_report, derangement, fvu, pair_report


@pytest.fixture(scope="module")
def pairs():
    g = torch.Generator().manual_seed(0)
    meaning = torch.randint(0, 5, (300,), generator=g)
    centre = 3 * torch.randn(5, 16, generator=g)
    return meaning, {m: centre[meaning] + torch.randn(300, 16, generator=g) for m in ("image", "text")}, centre


def test_everything_runs_on_a_random_sae(pairs):
    meaning, x, classes = pairs
    torch.manual_seed(0)
    sae = SAE(16, 40)
    sae.fit_normaliser(x)
    codes = {m: sae.encode(v, m) for m, v in x.items()}
    assert any(c.values.requires_grad for c in codes.values())
    x_hat = {m: sae.decode(c, m) for m, c in codes.items()}
    report = pair_report(codes["image"], codes["text"], x=x, x_hat=x_hat, same=meaning)
    assert report["code_cosine"]["difference"] > 0.1 and report["recall"]["embedding"]["image_to_text"][1] > 0.9
    truth = torch.nn.functional.one_hot(meaning, 5).bool()
    scores = concept_report(codes, truth, codes, truth, list("abcde"), ["class"] * 5)
    assert 0.4 < scores["concept_f1"]["same"] <= 1 and scores["concept_auc"]["same"] > 0.6
    image, text = (Side(codes[m], x[m]) for m in ("image", "text"))
    scorer = PairScorer.fit(image.codes, text.codes, image.x, text.x)
    found = mismatch(scorer, image, text, text.rows(derangement(300, same=meaning)))
    assert min(found.values()) > 0.7 and found["clip"] > 0.95
    r = zero_shot(sae, x["image"], meaning, classes, (x["image"], meaning))
    assert r["raw"] > 0.9 and r["code"] > 0.5 and r["enhanced"] >= r["raw"]
    assert fvu(x_hat["image"], x["image"]) > 0
