"""Latents for concepts beside those of an SAE: multimodal_saes, section 8."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import (
    AffineEncoder,
    BatchTopK,
    ConceptTopK,
    Dictionary,
    DistanceEncoder,
    PerModalityEncoder,
    TopK,
    append_concepts,
    prune_latents,
)
from tests.helpers.recipes import batch


def trained(selector=None, each=False, norm="unit", encoder=None):
    torch.manual_seed(0)
    encoder = encoder or (PerModalityEncoder(AffineEncoder()) if each else AffineEncoder())
    own = {m: Dictionary(norm) for m in (("image", "text") if each else ("shared",))}
    sae = SAE(16, 48, selector=selector or TopK(4), encoder=encoder, dictionaries=own)
    sae.fit_normaliser(batch(sae, 256, seed=9).x)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.05 * torch.randn_like(p))
    sae.project_()
    return sae.eval()


def rows(n=7, seed=1):
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("each", [False, True], ids=["shared", "per modality"])
def test_the_rest_codes_as_before_and_concepts_are_a_linear_autoencoder(each, tmp_path):
    sae, names = trained(each=each), ("image", "text")
    encode = {m: rows(seed=i) for i, m in enumerate(names)} if each else rows()
    new = append_concepts(sae, encode, encode, concept_k=3)
    assert new.d_sae == 55 and sae.d_sae == 48 and isinstance(new.selector, ConceptTopK)
    tokens = batch(sae, 64)
    with torch.no_grad():
        before, after = sae(tokens), new(tokens)
    for m in names:
        z = after[m].codes.to_dense()
        torch.testing.assert_close(z[:, :48], before[m].codes.to_dense())
        own = encode[m] if each else encode
        bias = sae.dictionary(m).bias
        u = (before[m].target - bias) @ own.T
        top = u.topk(3)
        want = torch.zeros_like(u).scatter(1, top.indices, top.values.relu())
        torch.testing.assert_close(z[:, 48:], want, rtol=1e-4, atol=1e-5)
        atoms = torch.nn.functional.normalize(own, dim=1)
        torch.testing.assert_close(after[m].recon, before[m].recon + want @ atoms, rtol=1e-4, atol=1e-5)
    again = SAE.from_pretrained(new.save_pretrained(tmp_path / "sae"))
    for m in names:
        assert torch.equal(again(tokens)[m].codes.to_dense(), after[m].codes.to_dense())


def test_free_atoms_keep_their_length_and_a_pruned_sae_takes_concepts():
    sae = prune_latents(trained(norm="free"), torch.arange(48.0), 20)
    new = append_concepts(sae, rows(), 3 * rows(), concept_k=99)
    assert torch.equal(new.dictionary("image").weight[20:], 3 * rows()) and new.selector.concept_k == 7
    assert torch.equal(new.dictionary("image").weight[:20], sae.dictionary("image").weight)


def test_gradients_reach_what_was_kept_alone():
    new = append_concepts(trained(), rows(), rows(), concept_k=2).requires_grad_().train()
    out = new(batch(new, 4))["image"]
    out.codes.values.sum().backward()
    used = torch.zeros(55, dtype=torch.bool)
    used[out.codes.indices[out.codes.values > 0]] = True
    assert torch.equal(new.encoder.weight.grad.any(1), used) and used[48:].any() and used[:48].any()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: append_concepts(trained(BatchTopK(4)), rows(), rows()), "selector 'topk' by value, not 'batch_topk'"),
        (lambda: append_concepts(trained(TopK(4, score="abs")), rows(), rows()), "by value, not 'topk'"),
        (lambda: append_concepts(trained(encoder=DistanceEncoder()), rows(), rows()), "encoder, not 'distance'"),
        (lambda: append_concepts(trained(), rows(), rows(6)), r"decoding rows .* shape \(7, 16\), not \(6, 16\)"),
        (lambda: append_concepts(trained(each=True), {"image": rows()}, rows()), "for text .*, not none"),
        (lambda: ConceptTopK(4, 3, 5), "between 1 and the 3 concepts, not 5"),
        (lambda: SAE(8, 10, selector=ConceptTopK(4, 7, 2)), "k = 4 and 7 concepts do not fit d_sae = 10"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
