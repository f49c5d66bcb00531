import pytest
import torch
from torch.nn.functional import normalize

from mmsae.evaluation.zeroshot.scores import (
    accuracy,
    class_embeddings,
    enhance,
    pool_templates,
    zero_shot_scores,
)
from mmsae.types import InputError
from tests.helpers.zeroshot import ToySAE, task


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
    x, _, classes = task()
    s = zero_shot_scores(ToySAE(), x, classes)
    assert torch.equal(enhance(s["raw"], s["code"], 0.0), s["raw"])


def test_ties_count_against_the_label():
    assert accuracy(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 0
    assert accuracy(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), k=3) == 1
