"""Edits of vision-language hosts, in one pass and while generating."""

import pytest
import torch

from mmsae.hosts import load_host
from mmsae.hosts.lvlm.tokens import PAD, QUESTION, select
from tests.helpers import lvlm as made
from tests.helpers.lvlm import picture

QUESTIONS = ["is there a red circle?", "what", "is there a blue square left of a red circle?"]


@pytest.fixture(scope="module", params=["llava", "llava_next", "qwen", "qwen3", "gemma", "internvl", "idefics"])
def host(request, tmp_path_factory):
    return load_host(getattr(made, request.param)(tmp_path_factory.mktemp(request.param)))


@pytest.fixture()
def batch(host):
    return host.collate.batch(QUESTIONS, [picture(0), picture(1), None])


def hooks(host):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.model.modules())


def push(x):
    """An edit of single rows that a cache may not change."""
    return x + 2 * x.roll(1, -1)


GREEDY = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [4, 5, 6, 7]}  # say no image


def tokens_of(host, batch, **options):
    out = host.generate(batch, max_new_tokens=5, **GREEDY, **options)
    return out[:, batch.inputs["input_ids"].shape[1] :]


def test_identity_edit_changes_no_bit_and_no_object(host, batch):
    clean, seen = host.forward(batch).logits, []
    layer = host.model.get_submodule(host.decoder).layers[1]
    with host.edit("layers.1:out[all]", lambda x: x):
        hook = layer.register_forward_hook(lambda m, a, out: seen.append(out))
        inner = layer.forward
        layer.forward = lambda *a, **k: seen.append(inner(*a, **k)) or seen[-1]
        assert torch.equal(host.forward(batch).logits, clean)
    del layer.forward
    hook.remove()
    assert seen[0] is seen[1]


@pytest.mark.parametrize("tokens", ["image", "text", "text_all", "all", "image_mean", "text_mean"])
def test_edit_reaches_its_tokens_and_no_others(host, batch, tokens):
    site = f"layers.1:out[{tokens}]"
    before = host.read(batch, ["layers.1:out[all]"])[0].x
    rows = []
    with host.edit(site, lambda x: rows.append(x) or torch.zeros_like(x)):
        after = host.read(batch, ["layers.2:in[all]"])[0].x
        at = host.read(batch, [site])[0]  # what is read there now; the outer edit came first
    assert torch.allclose(at.x, torch.zeros_like(at.x), atol=1e-5)
    kinds = batch.inputs["kinds"]
    assert torch.equal((after != before).any(1), select(tokens, kinds)[kinds != PAD])
    assert rows[0].shape == at.x.shape


def test_zeroing_changes_the_logits(host, batch):
    clean = host.forward(batch).logits[:, -1]
    for tokens, touched in (("text", [True, True, True]), ("image", [True, True, False])):
        with host.edit(f"layers.0:out[{tokens}]", torch.zeros_like):
            new = host.forward(batch).logits[:, -1]
        assert [not torch.allclose(a, b, atol=1e-4) for a, b in zip(clean, new, strict=True)] == touched
    assert torch.equal(host.forward(batch).logits[:, -1], clean)


@pytest.mark.parametrize("tokens", ["image", "text", "text_all", "all"])
def test_generation_with_a_cache_equals_generation_without(host, batch, tokens):
    clean = tokens_of(host, batch)
    with host.edit(f"layers.1:out[{tokens}]", push):
        cached, whole = tokens_of(host, batch), tokens_of(host, batch, use_cache=False)
        scores = [
            torch.stack(host.generate(batch, max_new_tokens=5, **GREEDY, use_cache=c, output_logits=True,
                                      return_dict_in_generate=True).logits)
            for c in (True, False)
        ]  # fmt: skip
    assert torch.equal(cached, whole) and torch.allclose(*scores, atol=1e-3)
    assert torch.equal(tokens_of(host, batch), clean)
    plain = host.generate(batch, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    assert not torch.allclose(plain.logits[0], scores[0][0], atol=1e-2)


def test_while_decoding_text_rows_are_the_new_tokens_and_images_do_not_come_again(host, batch):
    calls = {"image": [], "text": []}

    def note(m):
        return lambda x, where: calls[m].append((x.shape[0], where)) or x

    with host.edit("layers.0:out[image]", note("image"), where=True):
        with host.edit("layers.0:out[text]", note("text"), where=True):
            new = tokens_of(host, batch)
    assert len(calls["image"]) == 1 and calls["image"][0][1].image.all()
    first, *rest = calls["text"]
    length = batch.inputs["attention_mask"].sum(1)
    words = ~torch.isin(new, torch.tensor(host.vocabulary.special))
    assert first[1].start == 0 and len(first[1].item) == (batch.inputs["kinds"] == QUESTION).sum()
    step = 0
    for n, where in rest:  # a step whose new tokens are all special has no rows
        while not words[:, step].any():
            step += 1
        assert n == words[:, step].sum() and where.start == batch.inputs["input_ids"].shape[1] + step
        assert torch.equal(where.position, (length + step)[where.item])
        step += 1
    assert len(rest) == words[:, :4].any(0).sum()  # the fifth token is never put in


def test_mean_while_decoding_is_that_of_all_tokens_so_far(host, batch):
    means = []
    with host.edit("layers.1:in[text_mean]", lambda x: means.append(x) or x):
        ids = host.generate(batch, max_new_tokens=3, **GREEDY)
    whole = []
    with host.edit("layers.1:in[text_mean]", lambda x: whole.append(x) or x):
        host.generate(batch, max_new_tokens=3, **GREEDY, use_cache=False)
    assert len(means) == len(whole) == 3 and ids.shape[1] == batch.inputs["input_ids"].shape[1] + 3
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(means, whole, strict=True))


def test_beams_and_returned_sequences(host, batch):
    shapes = []
    with host.edit("layers.1:out[text]", lambda x: shapes.append(len(x)) or x):
        host.generate(batch, max_new_tokens=3, num_beams=2, **GREEDY)
    assert shapes[0] == 2 * (batch.inputs["kinds"] == QUESTION).sum()
    with host.edit("layers.1:out[text]", push):
        many = host.generate(batch, max_new_tokens=3, num_return_sequences=2, do_sample=True)
    assert len(many) == 6


def test_hooks_are_gone_after_exceptions(host, batch):
    host.forward(batch)  # transformers puts hooks of its own on the modules at the first call, and leaves them there
    before = hooks(host)

    def broken(x):
        raise RuntimeError("inside")

    for run in (host.forward, host.generate, host.loss):
        with pytest.raises(RuntimeError, match="inside"), host.edit("layers.1:out[text]", broken):
            run(batch)
        assert hooks(host) == before and host._known is None
    with pytest.raises(Exception, match="returned shape"), host.edit("layers.1:out[text]", lambda x: x[:1]):
        host.forward(batch)
    host.capture(batch)
    assert hooks(host) == before


def test_nested_edits_compose_and_capture_sees_them(host, batch):
    with host.edit("layers.0:out[text]", lambda x: x + 1):
        with host.edit("layers.0:out[text]", lambda x: x * 2):
            got = host.capture(batch, ["layers.0:out[text]"]).x["text"]
    assert torch.allclose(got, (host.capture(batch, ["layers.0:out[text]"]).x["text"] + 1) * 2, atol=1e-5)
