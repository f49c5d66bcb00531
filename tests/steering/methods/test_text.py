"""Text-encoder steering on a tiny Stable Diffusion: tagged branches, token kinds, words for words, concept vectors."""

import warnings

import pytest
import torch

from mmsae import SAE
from mmsae.hosts.sites import COND, UNCOND, Where
from mmsae.sae import AffineEncoder, DistanceEncoder, TopK
from mmsae.steering import Edit, FeatureStats, Intervention, attach
from mmsae.steering.methods.concept_vector import BOS, CONTENT, EOS, PAD, concept_steering, concept_vector, kinds
from mmsae.steering.methods.text import substitute, text_batch, text_codes, word_pair
from mmsae.types import InputError
from tests.helpers.diffusion import sd

SPEC = "text_encoder.layers.1:out[all]"
OPTIONS = {"steps": 2, "guidance": 3.0, "seed": 1}


@pytest.fixture(scope="module")
def host():
    from mmsae.hosts.diffusion.host import DiffusionHost

    return DiffusionHost(sd(), "tiny")


def make_sae(host, encoder=None, k=6):
    torch.manual_seed(0)
    site = host.site(SPEC)
    sae = SAE(site.width, d_sae=64, modalities=("text",), encoder=encoder or AffineEncoder(), selector=TopK(k))
    sae.sites = {"text": site}
    return sae.eval().requires_grad_(False)


def test_codes_with_signs_are_refused(host):
    signed = make_sae(host)
    signed.selector = TopK(6, score="abs")
    pair = word_pair(host, signed, SPEC, ["a cat"], ["a dog"])
    with pytest.raises(InputError, match="codes with signs may not"):
        substitute(pair)
    with pytest.raises(InputError, match="codes have signs"):
        concept_vector(host, signed, SPEC, "a cat")


@pytest.fixture(scope="module")
def sae(host):
    return make_sae(host)


@pytest.fixture(autouse=True)
def large_changes_are_wanted_here():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*may break")
        yield


def states(host, prompts):
    """``(B, L, d)`` of the site as the encoder makes it, edits included."""
    tokens = host.capture(text_batch(host, prompts), [SPEC])
    return tokens.x["text"].view(len(prompts), -1, tokens.x["text"].shape[1])


def encoded(host, site=SPEC):
    """A recorder of what is encoded, by branch, for ``host.edit``."""
    seen = {}

    def fn(rows, where):
        for branch in where.branch.unique().tolist():
            seen[branch] = rows[where.branch == branch]
        return rows

    return seen, host.edit(site, fn, where=True)


def test_kinds_of_tokens():
    special = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1]).bool()
    where = Where(torch.tensor([0] * 5 + [1] * 3), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]), special=special)
    assert kinds(where).tolist() == [BOS, CONTENT, CONTENT, EOS, PAD, BOS, CONTENT, EOS]


def test_a_feature_of_a_text_encoder_changes_content_tokens_of_the_positive_prompt_only(host, sae):
    codes, _ = text_codes(host, sae, SPEC, ["a red circle", "a cat"])
    stats = FeatureStats.of_codes([codes], "text")
    i = int(stats.mean_active.argmax())
    seen, clean = encoded(host)
    with clean:
        host.generate(["a red circle"], **OPTIONS)
    before = dict(seen)
    with attach(host, {SPEC: (sae, Intervention(Edit.set(i, 3.0), stats=stats))}) as log:
        seen, recorder = encoded(host)
        with recorder:
            host.generate(["a red circle"], **OPTIONS)
    moved = (seen[COND] != before[COND]).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 2, 3] and torch.equal(seen[UNCOND], before[UNCOND])
    assert log.share == pytest.approx(3 / 24)


def test_a_word_for_a_word_by_hand(host, sae):
    source, target = ["a red cat", "a photo of a red dog"], ["a blue cat", "a photo of a blue dog"]
    pair = word_pair(host, sae, SPEC, source, target)
    dense = []
    for prompts in (source, target):
        codes, tokens = text_codes(host, sae, SPEC, prompts)
        dense.append(codes.to_dense()[~tokens.special["text"]])
    assert [len(d) for d in dense] == [9, 9]
    delta = dense[1].mean(0) - dense[0].mean(0)
    torch.testing.assert_close(pair.delta, delta)
    going, coming = pair.top(6)
    assert going.tolist() == delta.argsort()[:3].tolist() and coming.tolist() == delta.argsort().flip(0)[:3].tolist()
    iv = substitute(pair, n=6, strength=2.0)
    ids = sorted([*going.tolist(), *coming.tolist()])
    at = (dense[0][:, going] > 0).any(1)
    want = (dense[1] - dense[0])[at][:, ids].mean(0)
    assert list(iv.edit.ids) == ids and iv.edit.ops[0].args["v"] == pytest.approx(want.tolist(), abs=1e-6)
    before = states(host, ["a red circle"])
    with attach(host, {SPEC: (sae, iv)}):
        after = states(host, ["a red circle"])
    z = sae.encode(before[0], "text").to_dense()
    fires = (z[:, going] > 0).any(1)
    fires[0] = False
    fires[4:] = False  # "a red circle" are tokens 1 to 3
    assert fires.any() and torch.equal((before != after).any(2)[0], fires)
    new = (z[:, ids] + 2 * want).clamp(min=0)
    dx = ((new - z[:, ids]) @ sae.dictionary("text").rows()[ids])[fires]
    torch.testing.assert_close((after - before)[0][fires], dx, rtol=1e-4, atol=1e-5)


def test_bad_word_pairs_are_refused(host, sae):
    with pytest.raises(InputError, match="as many prompts of both words, not 2 and 1"):
        word_pair(host, sae, SPEC, ["a red cat", "red"], ["a blue cat"])
    with pytest.raises(InputError, match="other numbers of tokens: 3 and 4"):
        word_pair(host, sae, SPEC, ["a red cat"], ["a blue green cat"])
    same = word_pair(host, sae, SPEC, ["a red cat"], ["a red cat"])
    with pytest.raises(InputError, match="nothing to exchange"):
        substitute(same)


def test_a_concept_vector_is_the_decoded_positive_precodes_without_bias(host, sae):
    v = concept_vector(host, sae, SPEC, "red circle")
    x = states(host, ["red circle"])[0]
    pre = (x - sae.dictionary("text").bias) @ sae.encoder.weight.T + sae.encoder.bias
    torch.testing.assert_close(v.vector, pre.relu() @ sae.dictionary("text").rows(), rtol=1e-4, atol=1e-5)
    assert v.kind.tolist() == [BOS, CONTENT, CONTENT, EOS] + [PAD] * 8 and v.content == 2
    torch.testing.assert_close(v.by_kind()[CONTENT], v.vector[1:3].mean(0))
    distance = make_sae(host, DistanceEncoder())
    with pytest.raises(InputError, match="encoder distance does not have"):
        concept_vector(host, distance, SPEC, "red")


@pytest.mark.parametrize("scope", ["sign", "cond"])
def test_branches_are_explicit_and_do_not_depend_on_the_order_of_calls(host, sae, scope):
    v = concept_vector(host, sae, SPEC, "red circle")
    seen, recorder = encoded(host)
    with recorder:
        host.generate(["blue dog"], **OPTIONS)
    before = dict(seen)
    with concept_steering(host, SPEC, v, -0.5, scope=scope, align="position") as log:
        seen, recorder = encoded(host)
        with recorder:
            host.generate(["blue dog"], **OPTIONS)
    torch.testing.assert_close(seen[COND] - before[COND], -0.5 * v.vector, rtol=1e-4, atol=1e-5)
    want = 0.5 * v.vector if scope == "sign" else torch.zeros_like(v.vector)
    torch.testing.assert_close(seen[UNCOND] - before[UNCOND], want, rtol=1e-4, atol=1e-5)
    assert log.share == (1 if scope == "sign" else 0.5) and log.relative > 0
    assert host.active_sites() == []


def test_prompts_of_another_length_are_refused_or_handled_by_kind(host, sae):
    v = concept_vector(host, sae, SPEC, "red circle")
    with concept_steering(host, SPEC, v, 1.0, align="same"):
        host.generate(["blue dog", "cat square"], **OPTIONS)
        with pytest.raises(InputError, match="is of 2 content tokens, a prompt has 4"):
            host.generate(["blue dog", "a photo of cat"], **OPTIONS)
    before = states(host, ["a photo of cat"])
    with concept_steering(host, SPEC, v, 2.0, align="kind"):
        moved = states(host, ["a photo of cat"]) - before
    kind = torch.tensor([BOS, CONTENT, CONTENT, CONTENT, CONTENT, EOS] + [PAD] * 6)
    torch.testing.assert_close(moved[0], 2 * v.by_kind()[kind], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="align 'end'"), concept_steering(host, SPEC, v, 1.0, align="end"):
        pass


def test_strength_zero_is_the_identity_and_a_window_of_steps_is_the_hosts(host, sae):
    v = concept_vector(host, sae, SPEC, "red circle")
    plain = host.generate(["blue dog"], **OPTIONS)
    with concept_steering(host, SPEC, v, 0.0) as log:
        assert torch.equal(host.generate(["blue dog"], **OPTIONS), plain) and log.share == 0
    with concept_steering(host, SPEC, v, 1.0):
        all_steps = host.generate(["blue dog"], **OPTIONS)
    with concept_steering(host, SPEC, v, 1.0, steps=(1, 2)):
        last_step = host.generate(["blue dog"], **OPTIONS)
    assert not torch.equal(all_steps, plain) and not torch.equal(last_step, plain)
    assert (last_step - plain).norm() < (all_steps - plain).norm()
