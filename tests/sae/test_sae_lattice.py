"""Which SAEs of the literature are equal at which settings: the lattice of sae_variants, section 12.5.

Both sides of an edge are what an SAE says, mostly its losses in a short training and its codes before and after it.
"""

import pytest
import torch
from torch.nn.functional import normalize

from mmsae import SAE
from mmsae.sae import (
    AffineEncoder,
    ArchetypalDictionary,
    AuxK,
    AuxZipf,
    BatchTopK,
    Dictionary,
    FeatureChoice,
    GatedEncoder,
    GaussianEncoder,
    GradientTopK,
    GroupSparse,
    JumpReLU,
    KLGaussian,
    LossContext,
    NestedReconstruction,
    NestedTopK,
    Normaliser,
    PairMask,
    PursuitEncoder,
    Reconstruction,
    ReLU,
    TopK,
    UsageTracker,
    to_jumprelu,
)
from tests.helpers.recipes import Run, batch

D, F, K, IMAGE, BOTH = 16, 48, 4, ("image",), ("image", "text")
CENTRED = {"centre": True, "scale": "rms"}


def made(selector=None, encoder=None, modalities=IMAGE, dictionary=None, d_sae=F, **normaliser):
    torch.manual_seed(0)
    own = Normaliser(**normaliser)
    sae = SAE(D, d_sae, None, modalities, own, encoder, selector, dictionary and {"shared": dictionary})
    sae.fit_normaliser(batch(sae, 256, seed=10_000).x)
    return sae


def codes(sae, n=64):
    with torch.no_grad():
        return torch.cat([out.codes.to_dense() for out in sae(batch(sae, n, seed=3)).values()])


def learns(selector=None, encoder=None, modalities=IMAGE, loss=None, also=(), **normaliser):
    """Losses of a training, codes in evaluation before and after it."""

    def run():
        sae = made(selector and selector(), encoder and encoder(), modalities, **normaliser)
        before = codes(sae.eval()) if not isinstance(sae.selector, BatchTopK) else torch.zeros(1)
        training = Run(sae, [loss() if loss else Reconstruction(), *(term() for term in also)])
        training.usage.since[:, ::3] = 10**9
        return torch.tensor(training.go(6)), before, codes(sae.eval())

    return run


def topk(**kw):
    return learns(lambda: TopK(K), **kw)


def batch_topk(loss=None):
    return learns(lambda: BatchTopK(K), loss=loss)


# Edges that no two trainings make.


def mutual_choice():
    """The k N largest entries of a batch, by a sort of all."""
    sae = made(BatchTopK(K)).train()
    with torch.no_grad():
        u = sae(batch(sae, 64, seed=3))["image"].pre.dense().relu()
    return u * (u >= u.flatten().sort(descending=True).values[K * 64 - 1])


def zipf_or_dead(term):
    def loss():
        sae = made(BatchTopK(K)).train()
        usage, terms = (
            UsageTracker(F, IMAGE),
            {"dead": AuxK(dead_after=100), "dying": AuxZipf(dead_after=10**12, exponent=0.0)},
        )
        usage.since[:, ::3] = 10**9
        if term == "dying":
            terms[term].build(sae)
            terms[term].known.fill_(1.0)
            terms[term].frequency[:] = 0.15  # which one batch does not move
            terms[term].frequency[:, ::3] = 0.0
        got = terms[term](sae(batch(sae, 64, seed=3)), LossContext(sae, usage))
        return got.detach(), *torch.autograd.grad(got, list(sae.parameters()))

    return loss


def gated(tied):
    """Both modes of a Gated SAE, or of the JumpReLU that its tied weights make."""

    def both():
        gate = made(ReLU(), GatedEncoder(), **CENTRED).double()
        e = gate.encoder
        with torch.no_grad():
            for p in (e.b_gate, e.b_mag, e.r_mag):
                p.copy_(0.3 * torch.randn(F))
        sae, scale = gate, e.r_mag.detach().exp()
        if not tied:
            sae = made(JumpReLU(log=False), AffineEncoder(), **CENTRED).double()
            with torch.no_grad():
                sae.encoder.weight.copy_(scale[:, None] * e.weight)
                sae.encoder.bias.copy_(e.b_mag)
                sae.selector.thresholds.copy_((e.b_mag - scale * e.b_gate)[None])
        return tuple(codes(sae.train(mode)) for mode in (True, False))

    return both


def folded():
    """TopK over a latent of each sign."""
    signed, sae = made(TopK(K, score="abs")), made(TopK(K), d_sae=2 * F)
    with torch.no_grad():
        for target, own in ((sae.encoder, signed.encoder), (sae.dictionary("image"), signed.dictionary("image"))):
            target.weight.copy_(torch.cat([own.weight, -own.weight]))
        sae.encoder.bias.copy_(torch.cat([signed.encoder.bias, -signed.encoder.bias]))
        sae.dictionary("image").bias.copy_(signed.dictionary("image").bias)
        z = sae(batch(sae, 64, seed=3))["image"]
    both = z.codes.to_dense()
    return both[:, :F] - both[:, F:], z.x_hat


def signed_topk():
    sae = made(TopK(K, score="abs"))
    with torch.no_grad():
        return codes(sae), sae(batch(sae, 64, seed=3))["image"].x_hat


def orthonormal(encoder, score):
    """Codes over atoms that are orthonormal, by an encoder or (None) by the selector."""

    def both():
        selector = None if encoder else TopK(K, score="abs" if score == "abs" else "value")
        sae = made(selector, encoder and PursuitEncoder(encoder, K, score), d_sae=D)
        with torch.no_grad():
            sae.dictionary("image").weight.copy_(torch.linalg.qr(torch.randn(D, D))[0])
            sae.encoder.tie_(sae.dictionaries)
            sae.dictionary("image").bias.normal_(std=0.1)
        return codes(sae)

    return both


def archetypal(own):
    """Atoms and codes at the start, with points or with a dictionary that has them."""

    def both():
        sae = made(TopK(K), dictionary=ArchetypalDictionary(points=64), **CENTRED)
        if not own:
            points = sae.dictionary("image").points
            sae = made(TopK(K), dictionary=Dictionary("free"), **CENTRED)
            with torch.no_grad():
                sae.dictionary("image").weight.copy_(points[:F])
                sae.dictionary("image").bias.zero_()
                sae.encoder.weight.copy_(normalize(points[:F]))
        return sae.dictionary("image").rows().detach(), codes(sae)

    return both


def thresholds(kind, score, export):
    def both():
        sae = made(kind(K, score=score), modalities=BOTH, dictionary=Dictionary("free"))
        Run(sae, [Reconstruction()]).go(6)
        return codes(to_jumprelu(sae) if export else sae.eval())

    return both


def one_level(loss, selector=BatchTopK):
    """The loss of one batch, in every unit, and its gradients."""

    def both():
        sae = made(selector(K)).train()
        out, found = sae(batch(sae, 64, seed=3)), []
        for reduction in ("fvu", "mse", "sum"):
            value = loss(reduction)(out, LossContext(sae))
            found += [value.detach(), *torch.autograd.grad(value, list(sae.parameters()), retain_graph=True)]
        return tuple(found)

    return both


def shared(selector=lambda: TopK(K), also=()):
    return learns(selector, modalities=BOTH, also=also, unit_in=True, centre=True, unit_out=True)


def vsae(rectified):
    return learns(
        lambda: TopK(K, score="abs"), lambda: GaussianEncoder(False, rectified=rectified),
        also=[lambda: KLGaussian(0.0)], **CENTRED,
    )  # fmt: skip


def of_score(score):
    return learns(lambda: TopK(K, score=score), **CENTRED)


EXACT, CLOSE, DOUBLE = 0.0, 1e-5, 1e-12
EDGES = [
    ("topk = g-sae at beta 0", topk(), learns(lambda: GradientTopK(K, beta=0.0)), EXACT),
    ("topk = topk with auxk at 0", topk(), topk(also=[lambda: AuxK(0.0)]), EXACT),
    ("topk = pre-codes times unit norms", topk(), learns(lambda: TopK(K, score="norm")), CLOSE),
    ("mutual choice = batch_topk", mutual_choice, lambda: codes(made(BatchTopK(K)).train()), CLOSE),
    ("matryoshka of one prefix = batch_topk", batch_topk(lambda: NestedReconstruction([1.0])), batch_topk(), EXACT),
    ("one prefix", one_level(lambda r: NestedReconstruction(reduction=r)), one_level(Reconstruction), EXACT),
    ("one drawn prefix", one_level(lambda r: NestedReconstruction((), 1, reduction=r)), one_level(Reconstruction),
     EXACT),
    ("one number of entries", one_level(lambda r: NestedTopK([1.0], reduction=r), TopK),
     one_level(Reconstruction, TopK), EXACT),
    ("tied gated = jumprelu", gated(True), gated(False), DOUBLE),
    ("abs_topk = topk of both signs", signed_topk, folded, CLOSE),
    *((f"{kind} of {sign} over orthonormal atoms = topk", orthonormal(kind, sign), orthonormal(None, sign), CLOSE)
      for kind in ("mp", "omp", "gp") for sign in ("relu", "abs")),
    ("aux_zipf of the dead = auxk", zipf_or_dead("dying"), zipf_or_dead("dead"), EXACT),
    ("vsae of fixed variance without kl = abs_topk", vsae(False), of_score("abs"), CLOSE),
    ("rectified vsae of fixed variance without kl = topk", vsae(True), of_score("value"), CLOSE),
    ("ra-sae at its start = its points", archetypal(True), archetypal(False), EXACT),
    *((f"exported {kind.name} by {score} = jumprelu", thresholds(kind, score, True), thresholds(kind, score, False),
       EXACT) for kind in (BatchTopK, FeatureChoice) for score in ("value", "norm")),
    ("gsae at 0 = shared topk", shared(also=[lambda: GroupSparse(0.0)]), shared(), EXACT),
    # modalities that are chosen together add their gradients up in another order
    ("mgsae of rate 0 = gsae", shared(lambda: PairMask(K, rate=0.0), [GroupSparse]), shared(also=[GroupSparse]),
     1e-5),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right", "tolerance"), [e[1:] for e in EDGES], ids=[e[0] for e in EDGES])
def test_they_are_equal(left, right, tolerance):
    pairs = [(v,) if isinstance(v, torch.Tensor) else v for v in (left(), right())]
    assert any(v.any() for v in pairs[1])
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
