"""Gradients of a host's losses at its sites: derivatives of what edits do, one for every row that is read."""

import pytest
import timm
import torch
import torch.nn.functional as F

from mmsae.hosts import Encoder, TimmHost, load_host
from mmsae.hosts.encoders.losses import LinearHead
from mmsae.hosts.gradient import reading
from mmsae.types import ImageTextBatch, InputError
from tests.helpers.lvlm import llava, sample

SITES = {
    "vit": {"image": "visual.transformer.resblocks.1:out[patches]", "text": "transformer.resblocks.0:update[mask]"},
    "custom": {"image": "image.pooled", "text": "text.pooled"},
    "resnet": {"image": "visual.layer2:out", "text": "text.embed"},
    "timm_vit": {"image": "visual.trunk.blocks.2:in[all]", "text": "text.transformer.resblocks.1:out[all]"},
}


def part(batch, which):
    """Some items of a batch of an encoder."""
    tensors = {n: v[which] for n in ("images", "texts", "labels") if (v := getattr(batch, n)) is not None}
    return batch._replace(uids=batch.uids[which], **tensors)


def assert_derivative(host, batch, sites, gradient, tolerance=2e-2):
    """Along a random direction, the loss changes as the gradient says (central difference)."""
    tokens, loss = host.capture(batch, sites, gradient), host.objective(gradient)
    plain = host.capture(batch, sites)
    for m, site in sites.items():
        assert torch.equal(tokens.x[m], plain.x[m]) and torch.equal(tokens.item[m], plain.item[m])
        g = tokens.grad[m]
        assert g.dtype == torch.float32 and g.shape == tokens.x[m].shape and not g.requires_grad and g.norm() > 0
        along = g / g.norm() + F.normalize(torch.randn(g.shape, generator=torch.Generator().manual_seed(0)), dim=1)
        step, values = 1e-2 / float(along.norm()), []
        for sign in (step, -step):
            with host.edit(site, lambda x, d=sign * along: x + d), torch.no_grad():
                values.append(float(loss.terms(host, batch).double().sum()))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((g * along).sum()), rel=tolerance)


@pytest.mark.parametrize("kind", SITES)
def test_contrastive_gradients_are_derivatives_of_the_loss(host, batch_for, kind):
    b = host(kind)
    assert_derivative(b, batch_for(b), SITES[kind], "contrastive")


def test_the_contrastive_loss_is_that_of_clip_and_of_siglip(host, batch_for):
    b = host("vit")
    batch = batch_for(b)
    image, text = (F.normalize(x, dim=1) for x in (b.encode_image(batch.images), b.encode_text(batch.texts)))
    p = (b.logit_scale * image @ text.T).double()
    want = -(p.log_softmax(1).diagonal() + p.log_softmax(0).diagonal()) / 2
    torch.testing.assert_close(b.objective("contrastive").terms(b, batch).double(), want, atol=1e-5, rtol=1e-5)
    b.model.logit_bias = torch.nn.Parameter(torch.tensor(-3.0), requires_grad=False)
    try:
        p = p - 3
        want = torch.where(torch.eye(4) > 0, -torch.sigmoid(p).log(), -(1 - torch.sigmoid(p)).log())
        torch.testing.assert_close(b.objective("contrastive").terms(b, batch).double(), want, atol=1e-4, rtol=1e-4)
    finally:
        b.model.logit_bias = None


def test_contrastive_items_are_each_others_negatives(host, batch_for):
    b = host("vit")
    batch = batch_for(b)
    whole = b.capture(batch, None, "contrastive").grad["image"]
    half = b.capture(part(batch, slice(2)), None, "contrastive").grad["image"]
    assert (whole[:2] - half).norm() > 0.1 * half.norm()
    assert b.capture(part(batch, slice(1)), None, "contrastive").grad["image"].abs().max() == 0  # nothing to tell apart


def test_padding_that_the_host_does_not_read_has_no_gradient(host, batch_for):
    b = host("vit")
    rows = b.read(batch_for(b), ["transformer.resblocks.0:out[all]"], "contrastive")[0]
    grad = rows.grad.view(4, -1, rows.grad.shape[1])
    end = batch_for(b).texts.argmax(1)  # attention is causal: nothing behind the pooled token reaches the loss
    for i in range(4):
        assert grad[i, end[i] + 1 :].abs().max() == 0 and (grad[i, : end[i] + 1].norm(dim=1) > 0).all()


def test_sites_behind_each_other_are_read_together(host, batch_for):
    b = host("vit")
    sites = ["visual.transformer.resblocks.0:out[all]", "visual.transformer.resblocks.1:out[all]", "image.embed"]
    together = b.read(batch_for(b), sites, "contrastive")
    for site, rows in zip(sites, together, strict=True):
        torch.testing.assert_close(rows.grad, b.read(batch_for(b), [site], "contrastive")[0].grad)


def test_bf16_keeps_the_direction(host, batch_for):
    exact, site = host("vit"), SITES["vit"]["image"]
    coarse = load_host(exact.hint, precision="bf16")
    a, b = (h.read(batch_for(exact), [site], "contrastive")[0].grad for h in (exact, coarse))
    assert b.dtype == torch.float32 and F.cosine_similarity(a, b).min() > 0.98


@pytest.fixture(scope="module")
def classified():
    torch.manual_seed(0)
    b = TimmHost(timm.create_model("test_vit"), "mine")
    images = torch.randn(4, *b.probe_input("image", 1).shape[1:], generator=torch.Generator().manual_seed(0))
    names = list("0123")
    return b, ImageTextBatch(images, None, names, names, names, names, labels=torch.tensor([3, 1, 4, 1]))


def test_classifier_gradients(classified):
    b, batch = classified
    sites = {"image": "blocks.3:out[patches]"}
    assert set(b.objectives) == {"classifier"}
    assert_derivative(b, batch, sites, "classifier")
    whole = b.capture(batch, sites, "classifier")
    halves = [b.capture(part(batch, s), sites, "classifier") for s in (slice(2), slice(2, None))]
    torch.testing.assert_close(torch.cat([t.grad["image"] for t in halves]), whole.grad["image"], atol=1e-6, rtol=1e-3)
    at_embed = b.capture(batch, {"image": "image.embed"}, "classifier")
    weight, bias = b.classifier
    p = (at_embed.x["image"] @ weight.T + bias).softmax(1)
    torch.testing.assert_close(at_embed.grad["image"], (p - F.one_hot(batch.labels, len(weight))) @ weight)
    with torch.inference_mode():  # as in Lightning's validation
        again = batch._replace(images=batch.images.clone(), labels=batch.labels.clone())
        assert torch.equal(b.capture(again, sites, "classifier").grad["image"], whole.grad["image"])


def test_a_zero_shot_head_is_an_objective_of_any_encoder(host, batch_for):
    b = host("vit")
    batch = batch_for(b)._replace(labels=torch.tensor([0, 1, 2, 0]))
    weight = b.logit_scale * F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    assert_derivative(b, batch, {"image": "image.embed"}, LinearHead(weight, unit=True).objective())
    with pytest.raises(InputError, match="class 2, the head has 2 classes"):
        b.capture(batch, {"image": "image.embed"}, LinearHead(weight[:2], unit=True).objective())


def test_the_loss_of_a_language_model(tmp_path):
    b = load_host(llava(tmp_path))
    say = [("is there a red circle ?", "yes"), ("what shows the picture ?", "a blue square left of a green circle .")]
    collate = b.collator("question+answer")
    samples = [sample(i, "", meta={"question": q, "answer": a}) for i, (q, a) in enumerate(say)]
    batch = collate(samples)
    assert_derivative(b, batch, b.sites("layers.1:out"), "lm")
    whole = b.capture(batch, "layers.1:out", "lm")
    alone = [b.capture(collate([s]), "layers.1:out", "lm") for s in samples]
    for m in ("image", "text"):
        torch.testing.assert_close(torch.cat([t.grad[m] for t in alone]), whole.grad[m], atol=1e-6, rtol=1e-3)
    last = [int(whole.position["text"][whole.item["text"] == i].max()) for i in range(2)]
    for i, end in enumerate(last):  # nothing is predicted behind the last token
        own = whole.item["text"] == i
        norms, at = whole.grad["text"][own].norm(dim=1), whole.position["text"][own]
        assert norms[at == end] == 0 and norms[at < end].min() > 0
    everything = b.read(batch, ["layers.1:out[all]"], "lm")[0]
    assert len(everything.x) == int(batch.inputs["attention_mask"].sum())  # padding gives no row


def test_what_has_no_gradient_is_refused(host, batch_for, classified):
    b, batch = host("vit"), batch_for(host("vit"))
    with pytest.raises(InputError, match=r"gradient is 'lm', but the losses of host .* are: contrastive"):
        b.capture(batch, None, "lm")
    with pytest.raises(InputError, match="needs images and texts"):
        b.capture(batch._replace(texts=None), {"image": "image.embed"}, "contrastive")
    with pytest.raises(InputError, match="needs images and class numbers"):
        classified[0].capture(classified[1]._replace(labels=None), None, "classifier")
    head = LinearHead(torch.ones(3, 16)).objective()
    with pytest.raises(InputError, match="was not reached"):
        b.capture(batch._replace(labels=torch.zeros(4, dtype=torch.long)), {"text": "text.embed"}, head)
    half = TimmHost(timm.create_model("test_vit"), "mine", precision="fp16")
    with pytest.raises(InputError, match="gradients underflow in fp16"):
        half.capture(classified[1], None, "classifier")


def test_loaders_bring_what_a_loss_reads(host, classified):
    b = host("vit")
    assert reading(b, ["image"], gradient="")["tokenize"] is None
    made = reading(b, ["image"], gradient="contrastive")
    assert made["tokenize"] is not None and made["transform"] is not None and "need" not in made
    assert reading(classified[0], ["image"], gradient="classifier")["need"] == ["image", "cls"]
    assert isinstance(b, Encoder)
