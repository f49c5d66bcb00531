"""SAeUron's edit by hand (T19), and a concept of a toy host forgotten while the others stay."""

import pytest
import torch

from mmsae.steering.edits.attach import attach
from mmsae.steering.edits.edit import Edit
from mmsae.steering.measure.images import unlearning
from mmsae.steering.methods.unlearn import ConceptStats, at_steps, concept_stats, forget, latents, tune
from mmsae.types import InputError
from tests.helpers.steer_toys import SITE, ToyDiffusion, amount, toy_sae


def test_t19_conditional_scaling():
    z = torch.tensor([[0.5, 2.0], [1.5, 0.5]])
    edit = Edit.cond_scale([3, 4], [-2.0, 0.0], [1.0, 1.0])
    torch.testing.assert_close(edit.apply(z), torch.tensor([[0.5, 0.0], [-3.0, 0.5]]))
    assert torch.equal(Edit.cond_scale([3, 4], 1.0, 0.0).apply(z), z), "gamma * mu = 1 is the identity"
    above = Edit.cond_scale([3, 4], 0.0, 0.0).apply(z)
    assert torch.equal(above, Edit.ablate([3, 4]).apply(z)), "gamma = 0 ablates above the threshold"


def stats():
    mean = torch.full((2, 2, 4), 0.25)
    mean[0, 0] = torch.tensor([3.0, 1.0, 0.0, 0.0])
    mean[0, 1] = torch.tensor([0.0, 0.0, 0.0, 2.0])
    return ConceptStats(mean, torch.tensor([1, 1]), ("red", "other"), 2)


def test_the_factor_is_gamma_times_the_concepts_mean_and_the_threshold_the_mean_over_concepts():
    first, second = forget(stats(), "red", percentile=90, gamma=-5)
    assert first == Edit.cond_scale([0], [-15.0], [(3 + 0.25) / 2])
    assert second == Edit.cond_scale([3], [-10.0], [(2 + 0.25) / 2])
    assert latents([first, second, second]) == {3: pytest.approx(2 / 3), 0: pytest.approx(1 / 3)}


def test_of_several_concepts_the_later_wins_a_latent():
    mean = torch.tensor([[[4.0, 0, 0, 1]], [[3.0, 0, 1, 0]], [[0, 9.0, 0, 0]]])
    three = ConceptStats(mean, torch.tensor([1, 1, 1]), ("a", "b", "c"), 1)
    [edit] = forget(three, ["a", "b"], percentile=70, gamma=-1)
    assert edit.ids == (0,) and edit.ops[0].args["g"] == (-3.0,)
    [union] = forget(three, ["a", "c"], percentile=70, gamma=-1)
    assert sorted(union.ids) == [0, 1]
    with pytest.raises(InputError, match="no statistics of concept 'x'"):
        forget(three, "x")


def test_red_is_forgotten_and_green_stays():
    host, sae = ToyDiffusion(), toy_sae()
    words = {c: [f"{c} left", f"{c} right", c] for c in ("red", "green", "blue")}
    found = concept_stats(host, sae, SITE, words, steps=2, guidance=3.0, seed=5)
    prompts = ["red left", "red", "green left", "blue"]
    options = {"steps": 2, "guidance": 3.0, "seed": [100, 101, 102, 103]}

    def draw(edits):
        with attach(host, at_steps(SITE, sae, edits)) as log:
            pictures = host.generate(prompts, **options)
        return pictures, log

    def judge(pictures):
        seen = torch.stack([amount(c)(pictures, prompts) for c in words]).argmax(0)
        seen[pictures.flatten(1).amax(1) < 0.5] = -1
        right = seen == torch.tensor([0, 0, 1, 2])
        return unlearning(right, [p.split()[0] for p in prompts], "red")

    assert judge(host.generate(prompts, **options)).ua == 0
    edits = forget(found, "red", percentile=90, gamma=-1.0)
    assert latents(edits) == {0: 1.0}, "the planted latent, at every step"
    after, log = draw(edits)
    assert judge(after)[:2] == (1, 1) and log.share > 0
    before = host.generate(prompts, **options)
    assert torch.equal(after[2:], before[2:]), "pictures without red do not change by a bit"
    tried = tune(found, "red", lambda e: judge(draw(e)[0]), percentiles=[90.0], gammas=[0.5, -1.0, -5.0])
    assert [s.gamma for s in tried] == [-1.0, -5.0, 0.5] and tried[0].result.objective == 1
    with pytest.raises(InputError, match="at least one"):
        tune(found, "red", judge, percentiles=[])


def test_edits_of_more_steps_than_the_schedule_are_refused():
    host, sae = ToyDiffusion(), toy_sae()
    edits = [Edit.cond_scale(0, -1.0, 0.5)] * 3
    with attach(host, at_steps(SITE, sae, edits)), pytest.raises(InputError, match=r"schedule has 2 steps"):
        host.generate(["red"], steps=2)
