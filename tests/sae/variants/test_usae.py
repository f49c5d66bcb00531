"""One code for several hosts: multimodal_saes, section 6."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import LossContext, Reconstruction, TopK, UniversalReconstruction
from tests.helpers.pairs import NAMES, streams
from tests.helpers.recipes import batch


def test_a_step_moves_the_drawn_sae_alone_and_its_dictionary_by_its_own_error():
    sae = streams(TopK(5), n=3)
    term, tokens = UniversalReconstruction(), batch(sae, 64)
    term.check(sae)
    seen = set()
    for step in range(8):
        ctx = LossContext(sae, step=step)
        out = sae(tokens)
        source = term.drawn(out, ctx)
        seen.add(source)
        sae.zero_grad()
        term(out, ctx).backward()
        for m in out:
            moved = [
                p.grad is not None for p in (*sae.encoder.encoders[m].parameters(), *sae.dictionaries[m].parameters())
            ]
            assert all(moved) if m == source else not any(moved)
        atoms = sae.dictionary(source).weight.grad.clone()
        encoder = sae.encoder.encoders[source].weight.grad.clone()
        sae.zero_grad()
        error = Reconstruction().of(sae(tokens)[source], source, ctx)
        error.backward()
        torch.testing.assert_close(atoms, sae.dictionary(source).weight.grad)
        assert not torch.allclose(encoder, sae.encoder.encoders[source].weight.grad)
    assert seen == set(NAMES)


def test_the_draw_is_even_and_that_of_the_step_and_its_value_is_the_sum_of_all_errors():
    sae = streams(TopK(5))
    term, out = UniversalReconstruction(), sae(batch(sae, 64))
    drawn = [term.drawn(out, LossContext(sae, step=i)) for i in range(600)]
    assert drawn[:20] == [term.drawn(out, LossContext(sae, step=i)) for i in range(20)]
    assert drawn.count("image") == pytest.approx(300, abs=60)
    assert drawn[:60] != [term.drawn(out, LossContext(sae, step=i, seed=1)) for i in range(60)]
    ctx = LossContext(sae, step=drawn.index("text"))
    cross = out["text"].codes.to_dense() @ sae.dictionary("image").weight + sae.dictionary("image").bias
    want = (out["image"].target - cross).square().sum(1).mean() / sae.normaliser.variance("image")
    torch.testing.assert_close(term(out, ctx), want + Reconstruction().of(out["text"], "text", ctx))


def test_unequal_counts_and_shared_parts_are_refused():
    sae = streams(TopK(5))
    x = batch(sae, 8).x
    with pytest.raises(InputError, match=r"universal_reconstruction needs pairs.*'image': 8, 'text': 7"):
        UniversalReconstruction()(sae({"image": x["image"], "text": x["text"][1:]}), LossContext(sae))
    with pytest.raises(InputError, match=r"not 'affine' and \['shared'\]"):
        UniversalReconstruction().check(SAE(16, 48))
