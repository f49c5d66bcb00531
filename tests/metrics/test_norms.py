import torch

from mmsae import SAE
from mmsae.metrics import code_norms, epsilon_lbo
from mmsae.sae import Dictionary, Normaliser, TopK
from mmsae.types import Codes


def test_both_bounds_are_below_the_coherence_of_what_is_decoded_exactly():
    torch.manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(96, 24), dim=1)
    cos = atoms @ atoms.T
    coherence = (cos - torch.eye(96)).abs().max()
    z = torch.randn(200, 96) * (torch.rand(200, 96) < 0.1)
    published, tight = epsilon_lbo((z @ atoms).norm(dim=1), z, 96)
    assert (published <= tight).all() and (tight <= coherence).all()
    assert tight.mean() > 5 * published.mean()
    orthonormal = torch.linalg.qr(torch.randn(24, 24)).Q
    z = torch.randn(50, 24)
    published, tight = epsilon_lbo((z @ orthonormal).norm(dim=1), z, 24)
    assert published.max() < 1e-6 and tight.max() < 1e-6


def test_one_atom_says_nothing_of_the_coherence():
    published, tight = epsilon_lbo(torch.tensor([2.0]), torch.tensor([[0.0, 1.0, 0.0]]), 3)
    assert published.item() == 1.5 and tight.isnan().all()


def test_norms_of_a_code_count_atoms_and_the_bias():
    torch.manual_seed(1)
    sae = SAE(
        8,
        20,
        modalities=["image"],
        normaliser=Normaliser(scale="rms"),
        selector=TopK(3),
        dictionaries={"shared": Dictionary(norm="free")},
    ).eval()
    x = torch.randn(30, 8) + 1
    sae.fit_normaliser({"image": x})
    got = code_norms(sae, x)
    dictionary, z = sae.dictionary("image"), sae.encode(x).to_dense()
    f = torch.cat([z * dictionary.rows().norm(dim=1), dictionary.bias.norm().expand(30, 1)], 1)
    torch.testing.assert_close(got.code, f.norm(dim=1))
    torch.testing.assert_close(got.x, sae.normaliser(x, "image")[0].norm(dim=1))
    torch.testing.assert_close((got.published, got.tight), epsilon_lbo(got.x, f, 21))
    # the codes' form makes no difference
    sae.encoder.forward, was = sae.encoder.forward, sae.selector.forward
    sae.selector.forward = lambda pre, rows: (Codes(*was(pre, rows), 20).to_dense(), None)
    torch.testing.assert_close(code_norms(sae, x).tight, got.tight)
