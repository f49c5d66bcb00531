"""Precision of the encoder's product: it says what is chosen, and nothing else."""

import json

import pytest
import torch
from torch.nn import functional as F

from mmsae import SAE, InputError
from mmsae.kernels.plain import tf32
from mmsae.sae import (
    AffineEncoder,
    BatchTopK,
    Dictionary,
    DistanceEncoder,
    GatedEncoder,
    GroupMax,
    PerModalityEncoder,
    PursuitEncoder,
    ReLU,
    TopK,
    truncate,
)
from mmsae.sae.fingerprint import sae_fingerprint

D, WIDTH, K = 40, 200, 6
BIAS = dict(rtol=2**-7, atol=1e-3)  # where all rows are looked at, the bias is added to the product in float32


def model(precision=None, encoder=AffineEncoder, selector=None, seed=0):
    torch.manual_seed(seed)
    sae = SAE(D, WIDTH, modalities=["image"], encoder=encoder(), selector=selector or TopK(K), precision=precision)
    with torch.no_grad():
        if getattr(sae.encoder, "bias", None) is not None:
            sae.encoder.bias.normal_(std=0.1)
        sae.dictionaries["shared"].bias.normal_(std=0.1)
    return sae


def rows(n=300, seed=1):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def products(sae, x):
    """The encoder's product with operands of bfloat16, and as it is, both float32."""
    with torch.no_grad():
        if sae.encoder.name == "distance":
            norms = sae.encoder.weight.norm(dim=1)
            x, w, b = x / x.norm(dim=1, keepdim=True), sae.encoder.weight, None
            found = [F.linear(x.bfloat16(), w.bfloat16()).float() / norms, F.linear(x, w) / norms]
            return [2 - (2 - 2 * cosine).sqrt() for cosine in found]
        x, w, b = x - sae.dictionaries["shared"].bias, sae.encoder.weight, sae.encoder.bias
        return [F.linear(x.bfloat16(), w.bfloat16(), b.bfloat16()).float(), F.linear(x, w, b)]


@pytest.mark.parametrize("encoder", [AffineEncoder, DistanceEncoder])
@pytest.mark.parametrize("make", [TopK, lambda k: TopK(k, score="abs"), GroupMax, BatchTopK])
def test_bf16_chooses_by_its_product_and_keeps_values_of_float32(encoder, make):
    k = 8
    sae, x = model("bf16", encoder, make(k)), rows()
    codes = sae({"image": x})["image"].codes
    rounded, exact = products(sae, x)
    on = torch.zeros(len(x), WIDTH, dtype=torch.bool).scatter(1, codes.indices, codes.values != 0)
    want = exact if sae.signed else exact.relu()
    torch.testing.assert_close(codes.values, want.gather(1, codes.indices) * (codes.values != 0), rtol=3e-6, atol=3e-6)
    ranked = rounded.abs() if sae.signed else rounded
    if sae.selector.name == "group_max":
        groups = ranked.unflatten(1, (k, -1))
        kept = torch.where(on, ranked, -torch.inf).unflatten(1, (k, -1)).amax(2)
        torch.testing.assert_close(kept[kept.isfinite()], groups.amax(2)[kept.isfinite()], **BIAS)
        return
    least = torch.where(on, ranked, torch.inf)
    most = torch.where(on, -torch.inf, ranked)
    if sae.selector.name == "batch_topk":  # of all rows together
        assert on.sum() == k * len(x)
        torch.testing.assert_close(least.min(), most.max(), **BIAS)
        return
    assert (on.sum(1) == k).all() and (least.amin(1) >= most.amax(1)).all()
    assert (on != torch.zeros_like(on).scatter(1, exact.topk(k).indices, True)).any()  # near ties are chosen otherwise


def test_strict_compares_values_of_float32():
    sae, x = model("bf16", selector=TopK(K, strict=True)), rows()
    codes = sae({"image": x})["image"].codes
    assert codes.values.dtype == torch.float32 and (codes.l0() == K).all()  # equal numbers of bfloat16 are no ties


def test_gradients_are_those_of_float32_for_what_was_chosen():
    sae, x = model("bf16"), rows()
    out = sae({"image": x})["image"]
    got = torch.autograd.grad((out.x_hat - x).square().sum(), list(sae.parameters()))
    ids, bias = out.codes.indices, sae.dictionaries["shared"].bias
    u = F.linear(x - bias, sae.encoder.weight, sae.encoder.bias)
    z = torch.zeros_like(u).scatter(1, ids, u.gather(1, ids).relu())
    want = torch.autograd.grad(
        (z @ sae.dictionaries["shared"].weight + bias - x).square().sum(), list(sae.parameters())
    )
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() / b.norm() < 1e-6


def test_what_chooses_nothing_keeps_the_product_and_its_gradients():
    sae, x = model("bf16", selector=ReLU()), rows()
    out = sae({"image": x})["image"]
    exact = products(sae, x)[1].relu()
    assert out.codes.values.dtype == torch.float32
    assert 0 < (out.codes.values - exact).norm() / exact.norm() < 1e-2
    got = torch.autograd.grad(out.codes.values.square().sum(), sae.encoder.weight)[0]
    bias = sae.dictionaries["shared"].bias.detach()
    by_hand = (2 * exact).T @ (x - bias)
    assert (got - by_hand).norm() / by_hand.norm() < 1e-2


def test_on_the_cpu_tf32_is_float32_and_double_stays_double():
    x = rows()
    with torch.no_grad():
        codes = [model(p)({"image": x})["image"].codes for p in (None, "fp32", "tf32")]
        assert all(torch.equal(c.to_dense(), codes[0].to_dense()) for c in codes[1:])
        double = [model(p).double()({"image": x.double()})["image"].codes for p in ("bf16", None)]
        assert torch.equal(*(c.to_dense() for c in double))


def test_tf32_is_said_of_one_product():
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    with pytest.raises(RuntimeError, match="stop"), tf32():
        assert getattr(matmul, name) in ("tf32", True)
        raise RuntimeError("stop")
    assert getattr(matmul, name) == before


def test_it_is_stored_and_a_file_that_does_not_say_it_means_fp32(tmp_path):
    for given in (None, "bf16"):
        folder = model(given).save_pretrained(tmp_path / str(given))
        assert json.loads((folder / "cfg.json").read_text())["mmsae"]["precision"] == given
        assert SAE.from_pretrained(folder).precision == given
    assert truncate(SAE.from_pretrained(folder), 50).precision == "bf16"
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["mmsae"]["precision"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert SAE.from_pretrained(folder).precision == "fp32"
    cfg["mmsae"]["precision"] = "fp8"
    (folder / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(InputError, match=r"cfg.json is not what mmsae writes: precision is 'fp8'"):
        SAE.from_pretrained(folder)


def test_another_precision_is_another_model_and_the_default_is_as_it_was():
    assert sae_fingerprint(model()) == sae_fingerprint(model("fp32")) != sae_fingerprint(model("bf16"))


def test_what_is_refused():
    with pytest.raises(InputError, match="precision must be one of fp32, tf32, bf16, not 'half'"):
        SAE(8, 32, precision="half")
    for encoder in (PursuitEncoder(), GatedEncoder(), PerModalityEncoder(GatedEncoder())):
        selector = None if encoder.is_pursuit else ReLU()
        with pytest.raises(InputError, match="computes in float32: it takes no precision 'bf16'"):
            SAE(8, 32, encoder=encoder, selector=selector, precision="bf16")
    dictionaries = {m: Dictionary() for m in ("image", "text")}
    assert SAE(8, 32, encoder=PerModalityEncoder(AffineEncoder()), dictionaries=dictionaries, precision="bf16")
