import math

import pytest
import torch

from mmsae.hosts.lvlm.cache import caches
from mmsae.hosts.sites import Where
from mmsae.lvlm.decoding.concept import ConceptDecoder, ConceptShift, WriteBack, mix_logits
from mmsae.lvlm.decoding.settings import PRESETS, Settings
from mmsae.sae import SAE, Dictionary, DistanceEncoder, TopK
from mmsae.sae.aligner import Aligner
from mmsae.types import InputError
from tests.helpers.lvlm_jobs import QUESTIONS, make_host, sample

GREEDY = Settings(alpha_c=0.0, beta_c=0.0, do_sample=False)

SITE = "layers.1:out"
IMAGE_TOKEN = 4  # a model that says one asks for an image that is not there
STRONG = Settings(alpha_c=1.0, beta_c=0.0, alpha_m=1.0, beta_m=0.9, max_new_tokens=6, do_sample=False)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return make_host(tmp_path_factory.mktemp("decoding"))


@pytest.fixture(scope="module")
def parts(host):
    """A VL-SAE with large decoders on aligned states, so that its edits are felt."""
    torch.manual_seed(0)
    aligner = Aligner(host.hidden_size, width=20).eval()
    sae = SAE(20, 64, encoder=DistanceEncoder(), selector=TopK(8),
              dictionaries={m: Dictionary("free") for m in ("image", "text")}).eval()  # fmt: skip
    with torch.no_grad():
        sae.dictionaries["text"].weight.mul_(20)
        aligner.restore["text"].weight.mul_(5)
    return sae, aligner


def batch(host, n=3):
    return host.collate([sample(i, QUESTIONS[i % 4]) for i in range(n)])


def test_mixing_oracle():
    z, steered = torch.tensor([[2.0, 1.9, 0.0]]), torch.tensor([[0.0, 3.0, 5.0]])
    assert 2 + math.log(0.8) == pytest.approx(1.776856, abs=1e-6)
    mixed = mix_logits(z, steered, 0.6, 0.8)
    assert mixed[0].tolist() == pytest.approx([0.8, 2.56, -math.inf])
    assert mixed.softmax(-1)[0].tolist() == pytest.approx([0.14679, 0.85321, 0], abs=1e-5)
    assert torch.equal(mix_logits(z, steered, 0.0, 0.0), z) and torch.equal(mix_logits(z, None, 0.6, 0.0), z)
    out = z.masked_fill(torch.tensor([[True, False, False]]), -math.inf)  # by an earlier processor
    assert mix_logits(out, steered, 1.0, 0.0)[0].tolist() == [-math.inf, 3.0, 5.0]
    assert torch.equal(mix_logits(z, steered, 0.6, 1.5), z)  # nothing is plausible: the clean pass decides


def test_the_clean_best_always_survives():
    g = torch.Generator().manual_seed(0)
    z, steered = torch.randn(50, 9, generator=g), 5 * torch.randn(50, 9, generator=g)
    for beta in (0.1, 0.8, 1.0):
        mixed = mix_logits(z, steered, 0.9, beta)
        assert mixed.gather(1, z.argmax(1, keepdim=True)).isfinite().all()
    assert torch.equal(mix_logits(z, steered, 0.9, 1.0).argmax(1), z.argmax(1))


def rows_of(lengths, image, d=4, start=0):
    """Rows of items with these lengths; ``image`` are (first, last) image positions."""
    item = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    position = torch.cat([torch.arange(n) for n in lengths]) + start
    is_image = (position >= image[0]) & (position < image[1]) & (start == 0)
    x = torch.randn(len(item), d, generator=torch.Generator().manual_seed(start))
    return x, Where(item, position, is_image, torch.zeros_like(is_image), start)


def test_write_back_oracle():
    """Mean of the text is as asked, differences stay, image tokens and tokens before are bit-identical."""
    x, where = rows_of([7, 5], (1, 3))
    goal = torch.randn(2, 4)
    out = WriteBack(lambda image, text: goal - text)(x, where)
    for i in range(2):
        own = where.item == i
        text = own & (where.position >= 3)
        torch.testing.assert_close(out[text].mean(0), goal[i])
        torch.testing.assert_close(out[text].diff(dim=0), x[text].diff(dim=0), rtol=0, atol=1e-6)
        assert torch.equal(out[own & ~text], x[own & ~text])
    assert WriteBack(lambda image, text: 0 * text)(x, where) is x
    seen = []
    WriteBack(lambda image, text: seen.append((image, text)) or text)(x, where)
    torch.testing.assert_close(seen[0][0][0], x[1:3].mean(0))
    torch.testing.assert_close(seen[0][1][1], x[10:].mean(0))


def test_incremental_mean_is_the_whole_mean():
    means = []
    edit = WriteBack(lambda image, text: means.append(text.clone()) or 0 * text)
    whole, where = rows_of([6, 6], (1, 3))
    edit(whole, where)
    new = []
    for step in range(3):
        x, at = rows_of([1, 1], (0, 0), start=6 + step)
        edit(x, at)
        new.append(x)
        for i in range(2):
            own = torch.cat([whole[where.item == i][3:], *(v[i : i + 1] for v in new)])
            torch.testing.assert_close(means[-1][i], own.mean(0))


def test_an_item_without_image_is_left_alone():
    x, where = rows_of([5, 5], (1, 3))
    where = where._replace(image=where.image & (where.item == 0))
    out = WriteBack(lambda image, text: torch.ones_like(text))(x, where)
    assert torch.equal(out[5:], x[5:]) and torch.equal(out[3:5], x[3:5] + 1)


def test_shift_is_that_of_the_mixed_code(parts):
    sae, aligner = parts
    image, text = torch.randn(2, 32), torch.randn(2, 32)
    codes = {m: sae.encode(aligner.align(x, m), m).to_dense() for m, x in (("image", image), ("text", text))}
    h = 0.1 * codes["text"] + 0.9 * codes["image"]
    made = aligner.unalign(h @ sae.dictionaries["text"].weight + sae.dictionaries["text"].bias, "text")
    want = (0.2 * text + 0.8 * made) - text
    torch.testing.assert_close(ConceptShift(sae, aligner, 0.8, 0.9)(image, text), want, rtol=1e-4, atol=1e-4)
    assert not ConceptShift(sae, aligner, 0.0, 0.9)(image, text).any()


def test_presets_are_the_published_ones():
    assert PRESETS["pope"][:4] == (0.6, 0.8, 0.8, 0.9) and PRESETS["pope"].max_new_tokens == 1024
    assert PRESETS["chair"][:4] == (0.6, 0.8, 0.7, 0.9) and PRESETS["chair"].max_new_tokens == 512
    assert PRESETS["pope"].control() == PRESETS["pope"]._replace(alpha_c=0)


def reference(host, decoder, item, steps):
    """The published loop: no cache, both passes over the whole sequence at every step, batch of one."""
    s, tokens = decoder.settings, []
    inputs = dict(item.inputs)
    for _ in range(steps):
        grown = item._replace(inputs=inputs)
        clean = host.forward(grown).logits[:, -1]
        clean[:, IMAGE_TOKEN] = -math.inf
        with host.edit(decoder.site, WriteBack(decoder.shift), where=True):
            steered = host.forward(grown).logits[:, -1]
        tokens.append(int(mix_logits(clean, steered, s.alpha_c, s.beta_c).argmax()))
        more = torch.tensor([[tokens[-1]]])
        inputs = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], more], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1),
            "kinds": torch.cat([inputs["kinds"], torch.full_like(more, 4, dtype=torch.uint8)], 1),
        }
        if tokens[-1] == 3:
            break
    return tokens


@pytest.mark.parametrize("settings", [STRONG, STRONG._replace(alpha_c=0.6, beta_c=0.05)])
def test_without_a_cache_it_is_the_published_loop(host, parts, settings):
    decoder = ConceptDecoder(host, *parts, settings, site=SITE)
    item = batch(host, 1)
    got = decoder.generate(item, use_cache=False, suppress_tokens=[IMAGE_TOKEN])[
        0, item.inputs["input_ids"].shape[1] :
    ].tolist()
    assert got == reference(host, decoder, item, 6)
    clean = host.generate(item, max_new_tokens=6, do_sample=False)[0, item.inputs["input_ids"].shape[1] :].tolist()
    assert clean != got


def test_the_cache_of_the_second_pass_is_kept(host, parts, monkeypatch):
    """One token at a time in both passes, and logits that are those of an edit of the same tokens without a cache."""
    decoder = ConceptDecoder(host, *parts, STRONG, site=SITE)
    item, lengths, inner = batch(host, 2), [], host.model.model.forward
    monkeypatch.setattr(
        host.model.model, "forward", lambda *a, **k: lengths.append(k["input_ids"].shape[1]) or inner(*a, **k)
    )
    out = decoder.generate(item, eos_token_id=-1)
    assert out.shape[1] == item.inputs["input_ids"].shape[1] + 6
    assert lengths == [lengths[0]] * 2 + [1] * 10 and lengths[0] > 1


def test_fixed_shift_with_and_without_cache(host, parts):
    """A shift that does not change from step to step gives the same tokens with a cache and without."""
    decoder = ConceptDecoder(host, *parts, STRONG, site=SITE)
    fixed = torch.randn(host.hidden_size, generator=torch.Generator().manual_seed(1)) * 3
    decoder.shift = lambda image, text: fixed.expand_as(text)
    item = batch(host)
    cached, whole = (decoder.generate(item, use_cache=c, eos_token_id=-1) for c in (True, False))
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, host.generate(item, max_new_tokens=6, do_sample=False, eos_token_id=-1))


def test_controls(host, parts):
    item = batch(host)
    want = host.generate(item, max_new_tokens=6, do_sample=False)
    for settings in (GREEDY, STRONG.control(), STRONG._replace(alpha_m=0.0), STRONG.control()._replace(beta_c=0.8)):
        got = ConceptDecoder(host, *parts, settings, site=SITE).generate(item, max_new_tokens=6, do_sample=False)
        assert torch.equal(got, want)
    assert not host.model._forward_pre_hooks and not host.model._forward_hooks


def test_sampling_is_that_of_transformers(host, parts):
    decoder = ConceptDecoder(host, *parts, PRESETS["pope"]._replace(alpha_c=0.0, beta_c=0.0), site=SITE)
    item = batch(host)
    torch.manual_seed(55)
    got = decoder.generate(item, max_new_tokens=5)
    torch.manual_seed(55)
    assert torch.equal(got, host.generate(item, max_new_tokens=5, do_sample=True, temperature=1.0, top_p=1.0))
    torch.manual_seed(55)
    answers = ConceptDecoder(host, *parts, PRESETS["pope"], site=SITE).answer(item, max_new_tokens=5)
    assert len(answers) == 3 and all(isinstance(a, str) for a in answers)


def test_an_item_does_not_see_its_batch(host, parts):
    decoder = ConceptDecoder(host, *parts, STRONG, site=SITE)
    together = decoder.answer(batch(host))
    alone = [decoder.answer(host.collate([sample(i, QUESTIONS[i])]))[0] for i in range(3)]
    assert together == alone


def test_taps(host, parts):
    sae, aligner = parts
    with pytest.raises(InputError, match="does not say where its states were read"):
        ConceptDecoder(host, sae, aligner)
    sae.sites = {m: host.site(f"layers.2:in[{m}_mean]") for m in ("image", "text")}
    try:
        assert ConceptDecoder(host, sae, aligner).site.io == "in"
        with pytest.raises(InputError, match=r"trained at .*layers.2:in, not at .*layers.2:out; .*allow_other_site"):
            ConceptDecoder(host, sae, aligner, site="layers.2:out")
        assert ConceptDecoder(host, sae, aligner, site="layers.2:out", allow_other_site=True).site.io == "out"
    finally:
        sae.sites = {}
    with pytest.raises(InputError, match="width 32, the text states' maps take 20"):
        ConceptDecoder(host, sae, None, site=SITE)
    with pytest.raises(InputError, match="num_beams is 2"):
        ConceptDecoder(host, sae, aligner, site=SITE).generate(batch(host), num_beams=2)


@pytest.mark.parametrize("how", ["prefill_chunk_size", "past"])
def test_a_prompt_in_pieces_is_refused(host, parts, how):
    decoder = ConceptDecoder(host, *parts, STRONG, site=SITE)
    whole, options = host.collate.batch(["is there a red circle?"], [None]), {"prefill_chunk_size": 3}
    if how == "past":
        begun = {k: whole.inputs[k][:, :3] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            options = dict(caches((), host.model(**begun, use_cache=True)))
    with pytest.raises(InputError, match="needs the prompt in one call and without a cache that was filled before"):
        decoder.generate(whole, **options)
