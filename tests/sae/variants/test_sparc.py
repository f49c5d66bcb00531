"""Joint selection and cross-reconstruction: multimodal_saes, section 6."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import (
    AffineEncoder,
    CrossReconstruction,
    GatedEncoder,
    JointTopK,
    LossContext,
    Reconstruction,
    TopK,
)
from tests.helpers.pairs import streams
from tests.helpers.recipes import batch


def dense(sae, x):
    return {m: out.codes.to_dense() for m, out in sae(x).items()}


@pytest.mark.parametrize("score", ["value", "abs", "norm"])
@pytest.mark.parametrize("encoder", [AffineEncoder, GatedEncoder], ids=["lazy", "computed"])
def test_in_training_the_streams_use_the_latents_with_the_largest_sums(encoder, score):
    sae = streams(JointTopK(5, score=score), encoder(), d_in={"image": 16, "text": 12, "audio": 16}, n=3)
    with torch.no_grad():
        for d in sae.dictionaries.values():
            d.weight.mul_(torch.rand(48, 1) + 0.5)
    out = sae(batch(sae, 300))
    u = {m: o.pre.dense() for m, o in out.items()}
    norms = {m: sae.dictionary(m).weight.norm(dim=1) for m in out}
    of = {"value": lambda m: u[m], "abs": lambda m: u[m].abs(), "norm": lambda m: u[m] * norms[m]}[score]
    chosen = sum(of(m) for m in out).topk(5).indices.sort().values
    for m, o in out.items():
        assert torch.equal(o.codes.indices.sort().values, chosen)
        value = getattr(o.pre, "value", None)
        value = (u[m] if value is None else value).gather(1, o.codes.indices)
        torch.testing.assert_close(o.codes.values, value if score == "abs" else value.relu())


def test_in_evaluation_each_stream_chooses_for_itself_and_equal_streams_choose_as_one():
    sae, plain = streams(JointTopK(5)), streams(TopK(5))
    x = batch(sae, 64).x
    for m, z in dense(sae.eval(), x).items():
        assert torch.equal(z, dense(plain.eval(), x)[m])
    torch.testing.assert_close(sae.encode(x["text"], "text").to_dense(), dense(sae, x)["text"])
    sae.encoder.encoders["text"], sae.dictionaries["text"] = sae.encoder.encoders["image"], sae.dictionaries["image"]
    same = {m: x["image"] for m in x}
    own = dense(sae, same)["image"]
    for z in dense(sae.train(), same).values():
        torch.testing.assert_close(z, own)


def test_gradients_reach_every_stream_at_the_chosen_latents_alone():
    sae = streams(JointTopK(5))
    out = sae(batch(sae, 64))
    for m, o in out.items():
        grad = torch.autograd.grad(o.codes.values.sum(), sae.encoder.encoders[m].weight, retain_graph=True)[0]
        used = torch.zeros(48, dtype=torch.bool)
        used[o.codes.indices[o.codes.values > 0]] = True
        assert torch.equal(grad.any(1), used) and used.any()


def test_codes_reconstruct_the_other_streams_in_units_of_their_variance():
    sae = streams(TopK(5), n=3)
    out, ctx = sae(batch(sae, 64)), LossContext(sae)
    want = 0.0
    for s in out:
        for t in set(out) - {s}:
            d = sae.dictionary(t)
            recon = out[s].codes.to_dense() @ d.weight + d.bias
            want += (out[t].target - recon).square().sum(1).mean() / sae.normaliser.variance(t)
    torch.testing.assert_close(CrossReconstruction(0.5)(out, ctx), 0.5 * want)


def test_where_streams_are_equal_the_cross_error_is_their_own():
    sae = streams(TopK(5))
    sae.encoder.encoders["text"], sae.dictionaries["text"] = sae.encoder.encoders["image"], sae.dictionaries["image"]
    sae.normaliser.variance("text").copy_(sae.normaliser.variance("image"))
    x = batch(sae, 64).x["image"]
    out, ctx = sae({"image": x, "text": x}), LossContext(sae)
    for reduction, times in (("fvu", 2.0), ("mse", 1.0)):  # the mean over streams, their sum
        cross, own = CrossReconstruction(1.0, reduction)(out, ctx), Reconstruction(reduction)(out, ctx)
        torch.testing.assert_close(cross, times * own)


def test_single_streams_and_unequal_counts_are_refused_by_name():
    sae = streams(JointTopK(5))
    x = batch(sae, 8).x
    fewer = {"image": x["image"], "text": x["text"][1:]}
    with pytest.raises(InputError, match=r"selector 'joint_topk' in training needs pairs.*'text': 7"):
        sae(fewer)
    with pytest.raises(InputError, match=r"not \{'image': 8\}"):
        sae({"image": x["image"]})
    out = sae.eval()(fewer)
    with pytest.raises(InputError, match=r"cross_reconstruction needs pairs: two modalities or more.*'text': 7"):
        CrossReconstruction()(out, LossContext(sae))
    with pytest.raises(InputError, match=r"'joint_topk' chooses for several streams.*\['image'\]"):
        SAE(8, 12, modalities=["image"], selector=JointTopK(4))
