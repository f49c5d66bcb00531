"""Oracles of the distance encoder (VL-SAE) and the shape contract of encoders."""

import pytest
import torch
from torch.nn import functional as F

from mmsae import SAE, InputError
from mmsae.sae import AffineEncoder, Dictionary, DistanceEncoder, PerModalityEncoder, TopK
from mmsae.sae.encoder import distance_score
from mmsae.sae.precodes import columns_below, stacked


def vl_sae(d=16, h=64, k=8, **kw):
    dictionaries = {m: Dictionary(norm="free") for m in ("image", "text")}
    return SAE(d, h, encoder=DistanceEncoder(), selector=TopK(k, **kw), dictionaries=dictionaries)


def test_map_from_cosine_to_score():
    cosine = torch.tensor([1, 0.9, 0.5, 0.3, 0, -0.5, -1], dtype=torch.double)
    want = torch.tensor([2, 1.552786, 1, 0.816784, 0.585786, 0.267949, 0], dtype=torch.double)
    torch.testing.assert_close(distance_score(cosine), want, atol=1.1e-3, rtol=0)  # the clamp costs 1e-3 at cosine 1
    torch.testing.assert_close(distance_score(cosine[1:]), want[1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(1 - (2 - want[1:]) ** 2 / 2, cosine[1:], atol=1e-6, rtol=0)


def test_the_gradient_at_distance_zero_is_finite():
    c = torch.tensor([1.0, 1 - 1.2e-7], requires_grad=True)
    distance_score(c).sum().backward()
    assert torch.isfinite(c.grad).all() and c.grad.abs().max() <= 1e3


def test_scale_of_input_and_prototypes_is_irrelevant():
    torch.manual_seed(0)
    sae, x = vl_sae(), torch.randn(20, 16)
    first = sae.encode(x, "image").to_dense()
    torch.testing.assert_close(sae.encode(7.5 * x, "image").to_dense(), first, atol=1e-5, rtol=0)
    with torch.no_grad():
        sae.encoder.weight.mul_(torch.rand(64, 1) + 0.1)
    torch.testing.assert_close(sae.encode(x, "image").to_dense(), first, atol=1e-5, rtol=0)


def test_triangle_inequality_and_range():
    torch.manual_seed(1)
    sae = vl_sae()
    x, y = torch.randn(50, 16), torch.randn(50, 16)
    a, b = (sae.encoder(v, sae.dictionary("image"), "image").dense() for v in (x, y))
    assert ((a >= 0) & (a <= 2)).all()
    gap = (F.normalize(x) - F.normalize(y)).norm(dim=1)
    assert ((a - b).abs().max(1).values <= gap + 1e-5).all()


def test_statistics_of_a_fresh_model():
    torch.manual_seed(2)
    sae, x = vl_sae(512, 4096, 256), torch.randn(256, 512)
    a = sae.encoder(x, sae.dictionary("image"), "image").dense()
    assert abs(float(a.mean()) - 0.5861) < 5e-4 and abs(float(a.std()) - 0.0313) < 5e-4
    codes = sae.encode(x, "image")
    assert abs(float(codes.values.min()) - 0.632) < 0.006 and abs(float(codes.to_dense().mean()) - 0.0405) < 5e-4


def test_swapping_modalities_changes_the_reconstruction_and_never_the_code():
    torch.manual_seed(3)
    sae, x = vl_sae(), torch.randn(4, 16)
    image, text = sae.encode(x, "image"), sae.encode(x, "text")
    assert torch.equal(image.to_dense(), text.to_dense())
    assert not torch.allclose(sae.decode(image), sae.decode(text))
    assert torch.equal(sae.decode(image, "text"), sae.decode(text))


def test_zero_rows_have_no_direction_and_no_code():
    sae = vl_sae()
    codes = sae.encode(torch.zeros(3, 16), "image")
    assert codes.l0().tolist() == [0, 0, 0]
    assert torch.equal(sae.decode(codes), sae.dictionary("image").bias.expand(3, -1))


def test_half_precision_input_keeps_k_entries_and_float32_codes():
    torch.manual_seed(4)
    sae, x = vl_sae(512, 4096, 256, strict=True), torch.randn(32, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = sae.encode(x.bfloat16(), "image")
    assert codes.values.dtype == torch.float32 and (codes.l0() == 256).all()


def test_affine_encoder_is_tied_at_the_start_and_takes_the_decoder_bias_off():
    torch.manual_seed(5)
    sae = SAE(8, 24, modalities=["image"], selector=TopK(4))
    torch.testing.assert_close(sae.encoder.weight, sae.dictionary("image").rows())
    with torch.no_grad():
        sae.dictionary("image").bias.normal_()
        sae.encoder.bias.normal_()
    x = torch.randn(5, 8)
    pre = sae.encoder(x, sae.dictionary("image"), "image")
    want = (x - sae.dictionary("image").bias) @ sae.encoder.weight.t() + sae.encoder.bias
    torch.testing.assert_close(pre.dense(), want)
    ids = torch.tensor([3, 0, 17])
    torch.testing.assert_close(pre.columns(ids), want[:, ids])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "asked", ["dense", "columns", "at", "known", "all", "rows", "stacked", "stacked shared", "below", "below shared"]
)
@pytest.mark.parametrize("input_has_gradients", [False, True])
def test_what_is_taken_off_the_input_has_the_gradients_of_the_dense_formula(bias, asked, input_has_gradients):
    torch.manual_seed(6)
    modalities = ["image", "text"]
    dictionaries = {m: Dictionary() for m in modalities} if asked in ("stacked", "below") else None
    encoder = AffineEncoder(bias=bias)
    sae = SAE(8, 100, modalities=modalities, encoder=encoder, selector=TopK(4), dictionaries=dictionaries).double()
    centres = [sae.dictionary(m).bias for m in modalities]
    for centre in {id(c): c for c in centres}.values():
        centre.data.normal_()
    x = torch.randn(2, 5, 8, dtype=torch.double, requires_grad=input_has_gradients)
    ids, some = torch.tensor([3, 0, 17]), torch.randint(100, (5, 4))
    pres = [sae.encoder(x[i], sae.dictionary(m), m) for i, m in enumerate(modalities)]
    dense = [(x[i] - c) @ sae.encoder.weight.t() + (sae.encoder.bias if bias else 0) for i, c in enumerate(centres)]
    forms = {
        "dense": lambda pre, _: pre.dense(),
        "columns": lambda pre, _: pre.columns(ids),
        "at": lambda pre, _: pre.at(some),
        "known": lambda pre, u: pre.at(some, u.detach().gather(1, some)),
        "all": lambda pre, _: torch.cat([pre.dense(), pre.columns(ids), pre.at(some)], 1),
        "rows": lambda pre, _: torch.cat([pre.rows(slice(2)).columns(ids), pre.rows(slice(2, 5)).columns(ids)]),
    }
    wants = {"dense": lambda u: u, "columns": lambda u: u[:, ids], "rows": lambda u: u[:, ids]}
    wants |= {"at": lambda u: u.gather(1, some), "known": lambda u: u.gather(1, some)}
    wants["all"] = lambda u: torch.cat([u, u[:, ids], u.gather(1, some)], 1)
    if "stacked" in asked:
        got, want = stacked(pres).columns(ids), torch.cat(dense)[:, ids]
    elif "below" in asked:
        got, want = columns_below(pres, ids), torch.cat(dense)[:, ids]
    else:
        got = torch.cat([forms[asked](pre, u) for pre, u in zip(pres, dense, strict=True)])
        want = torch.cat([wants[asked](u) for u in dense])
    torch.testing.assert_close(got, want)
    inputs = [sae.encoder.weight, *{id(c): c for c in centres}.values()]
    inputs += [sae.encoder.bias] * bias + [x] * input_has_gradients
    weights = torch.randn_like(want)
    grads = [torch.autograd.grad((u * weights + u.square()).sum(), inputs, retain_graph=True) for u in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_columns_of_several_below_each_other_where_columns_have_factors_and_rows_may_be_zero():
    encoder = DistanceEncoder()
    encoder.build({"image": 8, "text": 8}, 24, {})
    x = torch.randn(2, 5, 8)
    x[1, 3] = 0
    ids = torch.tensor([3, 0, 17])
    pres = [encoder(rows, Dictionary(), "image") for rows in x]
    want = torch.cat([pre.columns(ids) for pre in pres])
    got = columns_below(pres, ids)
    torch.testing.assert_close(got, want)
    assert not got[8].any() and got.any(1).sum() == 9
    grads = [torch.autograd.grad(u.square().sum(), encoder.weight, retain_graph=True)[0] for u in (got, want)]
    torch.testing.assert_close(*grads)
    other = DistanceEncoder()
    other.build({"image": 8}, 24, {})
    assert columns_below([pres[0], other(x[1], Dictionary(), "image")], ids) is None
    assert columns_below([pres[0], pres[1].rows(slice(4))], ids) is None


def test_a_decoder_bias_that_is_not_trained_stays_without_a_gradient():
    sae = SAE(8, 24, modalities=["image"], selector=TopK(4))
    bias = sae.dictionary("image").bias.requires_grad_(False)
    sae.encoder(torch.randn(5, 8), sae.dictionary("image"), "image").dense().sum().backward()
    assert bias.grad is None and sae.encoder.bias.grad is not None


def test_encoders_per_modality_take_different_widths_and_shared_ones_do_not():
    sae = SAE(
        {"image": 8, "text": 5}, 16, encoder=PerModalityEncoder(AffineEncoder()), selector=TopK(2),
        dictionaries={"image": Dictionary(), "text": Dictionary()},
    )  # fmt: skip
    assert sae.decode(sae.encode(torch.randn(3, 5), "text")).shape == (3, 5)
    with pytest.raises(InputError, match="equal widths, not image 8, text 5"):
        SAE({"image": 8, "text": 5}, 16, selector=TopK(2), dictionaries={"image": Dictionary(), "text": Dictionary()})
