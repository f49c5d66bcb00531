"""The step clock, and text edits that hold at some steps."""

import pytest
import torch

from mmsae.hosts.diffusion.call_state import CallState
from mmsae.hosts.sites import COND, UNCOND
from mmsae.types import InputError
from tests.helpers.diffusion import MAKE, scheduler

PROMPTS = ["a red circle", "large blue square on white background"]
SITE = "unet.mid_block.attentions.0:update"
TEXT = {"sd": "text_encoder.layers.1:out[content]", "sdxl": "text_encoder_2.layers.1:out[content]",
        "sd3": "text_encoder_2.layers.1:out[content]", "flux": "text_encoder_2.layers.1:out[content]"}  # fmt: skip


def options(kind):
    guided = {"true_cfg_scale": 2.0, "negative": "the cat"} if kind == "flux" else {"negative": "the cat"}
    return {"steps": 4, "height": 16, "width": 16, "output_type": "latent", **guided}


SCHEDULES = [
    ("DDIMScheduler", {}, [0, 1, 2, 3]),
    ("LCMScheduler", {}, [0, 1, 2, 3]),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, [0, 1, 2, 3]),  # as Turbo's
    ("DPMSolverMultistepScheduler", {}, [0, 1, 2, 3]),
    ("PNDMScheduler", {"skip_prk_steps": True}, [0, 0, 1, 2, 3]),
    ("HeunDiscreteScheduler", {}, [0, 0, 1, 1, 2, 2, 3]),
    ("KDPM2DiscreteScheduler", {}, [0, 0, 1, 1, 2, 2, 3]),
    ("KDPM2AncestralDiscreteScheduler", {}, [0, 0, 1, 1, 2, 2, 3]),
]


@pytest.mark.parametrize(("kind", "more", "want"), SCHEDULES, ids=[s[0] for s in SCHEDULES])
def test_the_clock_counts_steps_and_not_evaluations(hosts, kind, more, want):
    host, seen, gated = hosts("sd"), [], []
    host.pipeline.scheduler = scheduler(kind, **more)

    def first(rows):
        gated.append(host.run.step)
        return rows + 1

    for _ in range(2):  # a second generation begins at step 0 again
        seen.clear()
        gated.clear()
        with host.edit(SITE, lambda rows, w: (seen.append(w.step), rows)[1], where=True):
            with host.edit(SITE, first, steps=(0, 1)):
                host.generate(PROMPTS, steps=4)
        assert seen == want and gated == [s for s in want if s == 0]
    host.pipeline.scheduler = scheduler()


def test_a_schedule_of_ones_own(hosts):
    host, seen = hosts("sd"), []
    host.pipeline.scheduler = scheduler("LCMScheduler")
    with host.edit(SITE, lambda rows, w: (seen.append(w.step), rows)[1], where=True):
        host.generate(PROMPTS, steps=50, timesteps=[799, 499, 99])
    host.pipeline.scheduler = scheduler()
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("window", [(0, 5), (3, 9)])
def test_a_window_outside_of_the_schedule(hosts, window):
    for site in (SITE, TEXT["sd"]):
        with hosts("sd").edit(site, lambda rows: rows + 1, steps=window):
            with pytest.raises(InputError, match="the schedule has 4 steps"):
                hosts("sd").generate(PROMPTS, steps=4)
    with pytest.raises(InputError, match="0 <= start < end"), hosts("sd").edit(SITE, lambda rows: rows, steps=(2, 2)):
        raise AssertionError("opened")


def contexts(host, kind, *edits):
    """What the denoiser is given as context and pooled vector at every call."""
    got, stack = [], []
    for fn, window in edits:
        context = host.edit(TEXT[kind], fn, where=True, steps=window)
        context.__enter__()
        stack.append(context)

    def look(module, args, kwargs):
        pooled = (kwargs.get("added_cond_kwargs") or {}).get("text_embeds", kwargs.get("pooled_projections"))
        got.append((kwargs["encoder_hidden_states"].clone(), None if pooled is None else pooled.clone()))

    denoiser = host.model[host.denoiser]
    forward = denoiser.forward

    def spied(*args, **kwargs):
        look(denoiser, args, kwargs)
        return forward(*args, **kwargs)

    denoiser.forward = spied
    try:
        host.generate(PROMPTS, **options(kind))
    finally:
        del denoiser.forward
        for context in reversed(stack):
            context.__exit__(None, None, None)
    return got


def only(branch, amount):
    return lambda rows, w: rows + amount * (w.branch == branch)[:, None] * torch.linspace(-1, 1, rows.shape[1])


@pytest.mark.parametrize("kind", MAKE)
def test_a_text_edit_with_a_window_gives_the_edited_context_there_and_the_clean_one_elsewhere(hosts, kind):
    host = hosts(kind)
    clean, full = contexts(host, kind), contexts(host, kind, (only(COND, 1.0), None))
    gated = contexts(host, kind, (only(COND, 1.0), (1, 3)))
    per_step = len(clean) // 4
    assert len(gated) == 4 * per_step
    for i, (a, b, c) in enumerate(zip(clean, full, gated, strict=True)):
        want = b if i // per_step in (1, 2) else a
        assert torch.equal(c[0], want[0]) and (want[1] is None or torch.equal(c[1], want[1]))
    changed = [not torch.equal(a[0], b[0]) for a, b in zip(clean, full, strict=True)]
    assert any(changed)
    if kind != "flux":  # of [negative; positive], only the second half
        n = len(PROMPTS)
        assert all(torch.equal(a[0][:n], b[0][:n]) and not torch.equal(a[0], b[0]) for a, b in zip(clean, full))  # noqa: B905
    else:  # one call for each
        assert sum(changed) == 4
    if kind in ("sdxl", "sd3"):
        assert not torch.equal(clean[0][1], full[0][1])  # the second encoder's pooled vector moves as well
    two = contexts(host, kind, (only(COND, 1.0), (0, 2)), (only(COND, 0.5), (1, 4)))
    both = contexts(host, kind, (only(COND, 1.0), None), (only(COND, 0.5), None))
    assert torch.equal(two[per_step][0], both[per_step][0]) and torch.equal(two[0][0], full[0][0])


def test_branches_are_told_from_what_is_encoded_and_not_from_the_order_of_calls(hosts, monkeypatch):
    host = hosts("sd")
    by_hand = {}
    for branch in (COND, UNCOND):
        by_hand[branch] = contexts(host, "sd", (only(branch, 1.0), None))[0][0]
    clean = contexts(host, "sd")[0][0]
    assert torch.equal(by_hand[COND][:2], clean[:2]) and torch.equal(by_hand[UNCOND][2:], clean[2:])
    assert not torch.equal(by_hand[COND][2:], clean[2:]) and not torch.equal(by_hand[UNCOND][:2], clean[:2])

    encode = host.pipeline.encode_prompt

    def busy(*args, **kwargs):  # a pipeline that runs its text encoder once more before, as prompt weighting does
        host.pipeline.text_encoder(host.tokenize(["a dog", "the cat"]))
        return encode(*args, **kwargs)

    busy.__signature__ = __import__("inspect").signature(encode)
    monkeypatch.setattr(host.pipeline, "encode_prompt", busy)
    assert torch.equal(contexts(host, "sd", (only(COND, 1.0), None))[0][0], by_hand[COND])


def test_guidance_with_other_branches_is_refused(hosts):
    run, pipe = CallState(torch.arange(2)), hosts("sd").pipeline
    pipe._guidance_scale = 3.0
    assert run._split(pipe, 2, None) == (COND,) and run._split(pipe, 4, None) == (UNCOND, COND)
    with pytest.raises(InputError, match="6 rows for 2 images"):  # perturbed-attention guidance, say
        run._split(pipe, 6, None)
    pipe._guidance_scale = 1.0
    with pytest.raises(InputError, match="4 rows for 2 images"):  # an even batch is no sign of two branches
        run._split(pipe, 4, None)


def test_zeros_in_place_of_a_negative_prompt_stay_zeros(hosts):
    host, branches = hosts("sdxl"), []

    def look(rows, where):
        branches.extend(where.branch.unique().tolist())
        return rows + 1.0

    with host.edit(TEXT["sdxl"], look, where=True):
        a = host.generate(PROMPTS, steps=1, height=16, width=16)
        assert branches == [COND]  # nothing was encoded for the other branch
        branches.clear()
        host.generate(PROMPTS, steps=1, height=16, width=16, negative="the cat")
        assert branches == [COND, UNCOND]
    assert not torch.equal(a, host.generate(PROMPTS, steps=1, height=16, width=16))


def test_embeddings_that_are_given(hosts):
    host = hosts("sd")
    clean = host.generate(PROMPTS, steps=2, negative="the cat")
    with torch.no_grad():
        both = [host.pipeline.encode_prompt(p, "cpu", 1, False)[0] for p in (PROMPTS, ["the cat"] * 2)]
    given = {"prompt_embeds": both[0], "negative_prompt_embeds": both[1]}
    assert torch.equal(host.generate([], steps=2, **given), clean)
    with host.edit(SITE, only(UNCOND, 1.0), where=True):  # the branch is known all the same
        assert not torch.equal(host.generate([], steps=2, **given), clean)
    seen = []
    with host.edit(TEXT["sd"], lambda rows, w: (seen.extend(w.branch.unique().tolist()), rows)[1], where=True):
        host.generate(PROMPTS, steps=2, negative_prompt_embeds=both[1])
        assert seen == [COND]
        with pytest.raises(InputError, match="no text encoder will run"):
            host.generate([], steps=2, **given)
