import pytest
import torch
from torch.nn.functional import normalize

from mmsae.evaluation.zeroshot.scores import (
    accuracy,
    balanced_accuracy,
    class_embeddings,
    enhance,
    pool_templates,
    zero_shot,
    zero_shot_scores,
)
from mmsae.types import Codes, InputError


class ToySAE:
    """Row top-2 of a linear map; the text side is shifted, so that a forgotten modality would be seen."""

    def __init__(self, d=6, d_sae=10, seed=0):
        self.w = torch.randn(d_sae, d, generator=torch.Generator().manual_seed(seed))

    def encode(self, x, modality=None):
        assert modality in ("image", "text")
        v, i = (x @ self.w.T + (modality == "text")).topk(2, dim=1)
        return Codes(v.clamp(min=0), i, len(self.w), modality)

    def decode(self, codes, modality=None):
        assert codes.modality == modality
        return codes.decode_with(self.w) + (modality == "text")


def task(n=200, c=7, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    classes = torch.randn(c, d, generator=g) * 3
    labels = torch.randint(0, c, (n,), generator=g)
    return classes[labels] + 4 * torch.randn(n, d, generator=g), labels, classes


def test_template_oracle():
    """spec/probing.md section 13: templates count equally whatever their norm."""
    w = pool_templates(torch.tensor([[[1.0, 0], [0.6, 0.8]], [[1, 0], [6, 8]]]))
    torch.testing.assert_close(w, torch.tensor([[0.894427, 0.447214]] * 2))


def test_class_embeddings_fill_templates_and_keep_the_raw_scale():
    seen = []

    def embed(texts):
        seen.extend(texts)
        return torch.tensor([[len(t), 5.0] for t in texts])

    got = class_embeddings(embed, ["cat", "zebra"], ["a {}", "{} and {}"], batch_size=3)
    assert seen == ["a cat", "cat and cat", "a zebra", "zebra and zebra"]
    raw = torch.tensor([[len(t), 5.0] for t in seen]).view(2, 2, 2)
    torch.testing.assert_close(normalize(got), pool_templates(raw))
    torch.testing.assert_close(got.norm(dim=1), raw.norm(dim=-1).mean().expand(2))
    with pytest.raises(InputError, match="photo"):
        class_embeddings(embed, ["cat"], ["a photo"])


def test_enhancement_oracle():
    """spec/vl_sae.md section 11."""
    raw, concept = torch.tensor([[0.30, 0.31]]), torch.tensor([[0.60, 0.40]])
    assert enhance(raw, concept, 0).argmax() == 1
    torch.testing.assert_close(enhance(raw, concept, 0.2), torch.tensor([[0.42, 0.39]]))
    assert enhance(raw, concept, 0.2).argmax() == 0


def test_scores_equal_the_dense_formula():
    x, _, classes = task()
    sae = ToySAE()
    s = zero_shot_scores(sae, x, classes, chunk=33)
    zx, zc = sae.encode(x, "image"), sae.encode(classes, "text")
    torch.testing.assert_close(s["raw"], normalize(x) @ normalize(classes).T)
    torch.testing.assert_close(s["code"], normalize(zx.to_dense()) @ normalize(zc.to_dense()).T)
    want = normalize(sae.decode(zx, "image")) @ normalize(sae.decode(zc, "text")).T
    torch.testing.assert_close(s["recon"], want)


def test_alpha_zero_equals_plain_exactly():
    x, labels, classes = task()
    s = zero_shot_scores(ToySAE(), x, classes)
    assert torch.equal(enhance(s["raw"], s["code"], 0.0), s["raw"])
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


def test_ties_count_against_the_label():
    assert accuracy(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 0
    assert accuracy(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), k=3) == 1


def test_balanced_accuracy_weighs_classes_equally():
    scores = torch.eye(3)[[0, 0, 0, 1]]
    assert balanced_accuracy(scores, torch.tensor([0, 0, 0, 2])) == 0.5


def test_bad_input():
    x, labels, classes = task()
    with pytest.raises(InputError, match="'codes'"):
        zero_shot(ToySAE(), x, labels, classes, (x, labels), concept="codes")
    with pytest.raises(InputError, match=r"tuning labels go up to 9 but there are 7"):
        zero_shot(ToySAE(), x, labels, classes, (x, labels + 9 - labels.max()))
