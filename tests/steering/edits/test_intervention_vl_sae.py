"""VL-SAE: its codes, and edits of them (spec 6.5; the formulas of arXiv 2510.21323)."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

from mmsae.hosts.sites import Where
from mmsae.lvlm.decoding.concept import ConceptShift
from mmsae.steering import Edit, Intervention
from tests.helpers.steer_saes import make


def test_codes_are_distances_on_the_sphere():  # T23
    sae, x = make("vl_sae")
    w = sae.encoder.weight
    z = sae.encode(x, "image").to_dense()
    assert z.min() >= 0 and z.max() <= 2
    pre = sae({"image": torch.cat([5 * w[:1], -3 * w[:1]])})["image"].pre.dense()
    assert pre[0, 0] == pytest.approx(2, abs=2e-3) and pre[1, 0] == pytest.approx(0, abs=2e-3)
    assert torch.allclose(sae.encode(7 * x, "image").to_dense(), z, atol=1e-5)
    naive = 2 - (normalize(x, dim=1)[:, None] - normalize(w, dim=1)).norm(dim=2)
    assert torch.allclose(naive.topk(4).values, z.topk(4).values, atol=2e-3)


def test_edits_use_the_dictionary_of_the_modality():
    sae, x = make("vl_sae")
    for m in ("image", "text"):
        new = Intervention(Edit.add(5, 2.0), unit="raw").apply(sae, x, m)
        assert torch.allclose(new - x, 2 * sae.dictionary(m).weight[5].expand_as(x), atol=1e-5)


def test_alignment_without_strength_or_with_a_perfect_decoder_is_the_identity():  # T23
    sae, x = make("vl_sae")
    image, text = x[:5], x[5:10]
    assert not ConceptShift(sae, None, 0.0, 0.9)(image, text).any()
    assert ConceptShift(sae, None, 0.5, 0.9)(image, text).any()
    perfect = SimpleNamespace(
        encode=lambda x, m: SimpleNamespace(x=x, info=None, _replace=lambda info: SimpleNamespace(x=x)),
        decode=lambda codes, m: codes.x,
    )
    assert not ConceptShift(perfect, None, 0.5, 0.0)(image, text).any()
    assert torch.allclose(ConceptShift(perfect, None, 0.5, 0.3)(image, text), 0.15 * (image - text), atol=1e-6)


def test_mix_is_the_same_alignment_of_codes():
    sae, x = make("vl_sae")
    image, text = x[:5], x[5:10]
    both = torch.unique(torch.cat([sae.encode(image, "image").indices, sae.encode(text, "text").indices]))
    src = sae.encode(image, "image").gather(both)
    mixed = Intervention(Edit.mix(both, src, 0.3), unit="raw", writeback="splice").bind(sae, "text")
    new = mixed(text, Where(torch.arange(5)))
    assert torch.allclose(new - text, ConceptShift(sae, None, 1.0, 0.3)(image, text), atol=1e-4)
