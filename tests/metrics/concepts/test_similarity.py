import pytest
import torch

from mmsae.metrics import concept_similarity, intra_inter
from mmsae.metrics.concepts.similarity import top_means


def test_vlsae_oracle():
    """spec/vl_sae.md section 11."""
    image = torch.tensor([[1.0, 0], [0, 1]])
    text = torch.tensor([[1.0, 0], [0.5**0.5, 0.5**0.5]])
    s = intra_inter(image, text)
    assert s["intra"] == pytest.approx(0.853553, abs=1e-6)
    assert s["inter_upper"] == pytest.approx(0.707107, abs=1e-6)
    assert s["inter_sym"] == pytest.approx(0.353553, abs=1e-6)


def test_inter_upper_depends_on_order_and_inter_sym_does_not():
    g = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g)
    a, b = intra_inter(image, text), intra_inter(image.flip(0), text.flip(0))
    assert a["inter_sym"] == pytest.approx(b["inter_sym"]) and a["inter_upper"] != pytest.approx(b["inter_upper"])
    loop = [torch.cosine_similarity(image[i], text[j], dim=0) for i in range(6) for j in range(6) if i != j]
    assert a["inter_sym"] == pytest.approx(torch.stack(loop).mean().item(), abs=1e-6)


def test_top_means_leave_out_missing_samples_and_do_not_normalise():
    feats = torch.tensor([[1.0, 0], [0, 3], [10, 10]])
    rows = torch.tensor([[0, 1], [1, -1]])
    assert top_means(rows, feats).tolist() == [[0.5, 1.5], [0, 3]]


def test_latents_without_evidence_in_a_modality_are_not_drawn():
    feats = torch.eye(3)
    rows = torch.tensor([[0], [1], [2], [-1]])
    s = concept_similarity(rows, rows, feats, feats)
    assert s == {"intra": 1.0, "inter_upper": 0.0, "inter_sym": 0.0, "latents": 3}
    assert concept_similarity(rows, rows, feats, feats, n_latents=2)["latents"] == 2
