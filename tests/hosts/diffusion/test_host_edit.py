"""Edits in diffusion pipelines: which rows, which branch, and nothing else; oracles of guidance arithmetic."""

from contextlib import ExitStack

import pytest
import torch
from torch.overrides import TorchFunctionMode

from mmsae.hosts.diffusion.host import DiffusionHost
from mmsae.hosts.sites import COND, UNCOND
from mmsae.types import InputError
from tests.helpers.diffusion import MAKE, scheduler

PROMPTS = ["a red circle", "large blue square on white background"]
BLOCK = {
    "sd": "unet.up_blocks.0.attentions.1:update",
    "sdxl": "unet.mid_block.attentions.0:update",
    "sd3": "transformer.transformer_blocks.0:update",
    "flux": "transformer.single_transformer_blocks.0:update",
}
SIZE = {"sd": (16, 16), "sdxl": (16, 24), "sd3": (16, 16), "flux": (16, 32)}


def options(kind, **more):
    guided = {"true_cfg_scale": 2.0, "negative": "the cat"} if kind == "flux" else {"guidance": 3.0}
    height, width = SIZE[kind]
    return {"steps": 3, "seed": [1, 2], "height": height, "width": width, **guided, **more}


def shift(amount, branch):
    """Along a direction with mean 0: transformers take the mean away."""
    return lambda rows, w: rows + amount * (w.branch == branch)[:, None] * torch.linspace(-1, 1, rows.shape[1])


@pytest.mark.parametrize("kind", MAKE)
def test_a_prompt_alone_gives_the_picture_that_it_gives_in_a_batch(hosts, kind):
    host, opts = hosts(kind), options(kind)
    with host.edit(BLOCK[kind], shift(2.0, COND), where=True):
        both = host.generate(PROMPTS, **opts)
        alone = [host.generate(p, **{**opts, "seed": s}) for p, s in zip(PROMPTS, (1, 2), strict=True)]
        split = host.generate(PROMPTS, batch_size=1, **opts)
    assert both.shape == (2, 3, *SIZE[kind]) and both.dtype == torch.float32
    assert both.min() >= 0 and both.max() <= 1 and both.std() > 0.01
    torch.testing.assert_close(torch.cat(alone), both, atol=1e-4, rtol=0)
    assert torch.equal(split, torch.cat(alone))
    assert (both - host.generate(PROMPTS, **opts)).abs().max() > 1e-3


class OtherHalf(TorchFunctionMode):
    """torch as it is since 2.11 on some machines: half-precision normals are another sequence than float32's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.flip(-1) if func is torch.randn and out.dtype != torch.float32 else out


@pytest.mark.parametrize("kind", MAKE)
def test_a_seed_is_the_same_noise_at_every_precision(kind):
    pipe = MAKE[kind]()
    if kind == "sdxl":
        pipe.scheduler = scheduler("EulerAncestralDiscreteScheduler")  # which draws at every step
    seen, made = {}, {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        host = DiffusionHost(pipe.to(dtype))
        first = []
        see = lambda m, args, kwargs: first.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])  # noqa: B023, E731
        handle = host.model[host.denoiser].register_forward_pre_hook(see, with_kwargs=True)
        with OtherHalf():
            made[dtype] = host.generate(PROMPTS, steps=3, seed=[1, 2], height=16, width=16, output_type="latent")
        handle.remove()
        seen[dtype] = first[0]
    for dtype, precise in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        assert seen[dtype].dtype == dtype
        torch.testing.assert_close(seen[dtype].float(), seen[torch.float32], rtol=precise, atol=precise)
        assert (made[dtype] - made[torch.float32]).abs().mean() < 0.1 * made[torch.float32].abs().mean()
    if kind != "sdxl":  # whose schedule scales the noise in the pipeline's type
        assert torch.equal(seen[torch.bfloat16], seen[torch.float32].bfloat16())


@pytest.mark.parametrize("kind", MAKE)
def test_rows_say_what_they_are(hosts, kind):
    host, seen = hosts(kind), []

    def look(rows, where):
        seen.append((len(rows), where))
        return rows

    with host.edit(BLOCK[kind], look, where=True):
        host.generate(PROMPTS, **options(kind))
    calls = 6 if kind == "flux" else 3  # Flux calls its denoiser once per branch
    assert [w.step for _, w in seen] == [s for s in range(3) for _ in range(calls // 3)]
    h, w = {"sd": (4, 4), "sdxl": (4, 6), "sd3": (4, 4), "flux": (4, 8)}[kind]
    for n, where in seen:
        assert where.grid == (h, w) and n == len(where.item) == len(where.branch)
        assert torch.equal(where.position, torch.arange(h * w).repeat(n // (h * w)))
        assert not where.special.any()
    branches = torch.cat([where.branch for _, where in seen[: calls // 3]])
    items = torch.cat([where.item for _, where in seen[: calls // 3]])
    for b in (COND, UNCOND):
        assert torch.equal(items[branches == b], torch.arange(2).repeat_interleave(h * w))
    if kind != "flux":
        assert torch.equal(branches, torch.tensor([UNCOND, COND]).repeat_interleave(2 * h * w))


def test_images_of_one_prompt_are_neighbours(hosts):
    host, items = hosts("sd"), []

    def look(rows, where):
        items.append(where.item[:: where.grid[0] * where.grid[1]].tolist())
        return rows

    with host.edit(BLOCK["sd"], look, where=True):
        three = host.generate(PROMPTS, steps=1, seed=[5, 9], num_images_per_prompt=3, batch_size=4)
    assert items == [[0, 0, 0, 1] * 2, [1, 1] * 2]
    assert torch.equal(three[1], host.generate(PROMPTS[0], steps=1, seed=6, batch_size=4)[0]) or torch.allclose(
        three[1], host.generate(PROMPTS[0], steps=1, seed=6)[0], atol=1e-4
    )


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_an_edit_that_returns_its_rows_leaves_the_very_tensor(hosts, kind):
    host, before, after = hosts(kind), [], []
    module = host.model.get_submodule(host.site(BLOCK[kind]).module)
    hooks = [module.register_forward_hook(lambda m, a, out: before.append(out))]
    clean = host.generate(PROMPTS, **options(kind))
    before.clear()
    with host.edit(BLOCK[kind], lambda rows: rows), host.edit("text_encoder.layers.1", lambda rows: rows):
        hooks.append(module.register_forward_hook(lambda m, a, out: after.append(out)))
        assert torch.equal(host.generate(PROMPTS, **options(kind)), clean)
    for hook in hooks:
        hook.remove()
    assert len(before) == 3 and all(a is b for a, b in zip(before, after, strict=True))


def test_untouched_branches_positions_and_steps_are_bit_identical(hosts):
    host, site = hosts("sd"), BLOCK["sd"]
    module = host.model.get_submodule(host.site(site).module)

    def outputs(fn=None):
        out = []
        with ExitStack() as stack:
            if fn is not None:
                stack.enter_context(host.edit(site, fn, where=True))
            hook = module.register_forward_hook(lambda m, a, o: out.append(o[0].flatten(2).clone()))
            stack.callback(hook.remove)
            host.generate(PROMPTS, **options("sd"))
        return out

    clean = outputs(lambda rows, where: rows)
    edited = outputs(lambda rows, w: rows + (w.position < 3)[:, None] * (w.branch == COND)[:, None] * (w.step == 1))
    assert torch.equal(clean[0], edited[0])
    changed = (clean[1] != edited[1]).any(1)  # (4, 16)
    assert changed[2:, :3].all() and not changed[:2].any() and not changed[:, 3:].any()
    union = outputs(lambda rows, w: rows + 1.0 * (w.branch == COND)[:, None] + 1.0 * (w.branch == UNCOND)[:, None])
    assert torch.equal(union[0], outputs(lambda rows, w: rows + 1.0)[0])


@pytest.mark.parametrize("g", [3.0, 1.5])
def test_guidance_multiplies_an_edit_of_one_branch(hosts, g, monkeypatch):
    host, scheduler = hosts("sd"), hosts("sd").pipeline.scheduler
    eps, step = [], scheduler.step
    monkeypatch.setattr(scheduler, "step", lambda e, *args, **kw: (eps.append(e.clone()), step(e, *args, **kw))[1])

    def change(weights):
        def fn(rows, where):
            w = torch.tensor([weights[UNCOND], weights[COND]])[where.branch]
            return rows + w[:, None]

        eps.clear()
        with host.edit("unet.conv_out:out", fn, where=True):
            host.generate(PROMPTS, steps=1, guidance=g)
        return eps[-1]

    clean = change({COND: 0.0, UNCOND: 0.0})
    for weights, want in (
        ({COND: 1.0, UNCOND: 0.0}, g),
        ({COND: 0.0, UNCOND: 1.0}, 1 - g),
        ({COND: 1.0, UNCOND: 1.0}, 1.0),
        ({COND: 1.0, UNCOND: -1.0}, 2 * g - 1),
    ):
        torch.testing.assert_close(change(weights) - clean, torch.full_like(clean, want), atol=1e-5, rtol=0)


@pytest.mark.parametrize("g", [1.0, 0.0])
def test_without_guidance_everything_is_conditional(hosts, g):
    host, seen = hosts("sdxl"), []

    def look(rows, where):
        seen.append((len(rows), where.branch.unique().tolist(), where.item.unique().tolist()))
        return rows + 1.0 * (where.branch == COND)[:, None]

    clean = host.generate(PROMPTS, steps=1, guidance=g)
    with host.edit(BLOCK["sdxl"], look, where=True):
        assert not torch.equal(host.generate(PROMPTS, steps=1, guidance=g), clean)
    assert seen == [(32, [COND], [0, 1])]  # two prompts of 4 x 4: an even batch is no sign of two branches


def test_a_guidance_distilled_denoiser_has_one_branch():
    host, branches = DiffusionHost(MAKE["sd"](time_cond_proj_dim=8)), []

    def look(rows, where):
        branches.extend(where.branch.unique().tolist())
        return rows

    with host.edit("unet.mid_block.attentions.0:out", look, where=True):
        host.generate(PROMPTS, steps=1, guidance=8.0)
    assert branches == [COND]


def test_hooks_are_gone_and_two_generations_are_equal(hosts):
    host, opts = hosts("sd"), options("sd")
    sites = [BLOCK["sd"], "text_encoder.layers.0:out[content]", "unet.down_blocks.0.attentions.0:in"]
    clean = host.generate(PROMPTS, **opts)
    count = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.model.modules())  # noqa: E731
    before = count()
    with ExitStack() as stack:
        for s in sites:
            stack.enter_context(host.edit(s, lambda rows: rows * 1.1))
        assert len(host.active_sites()) == 3
        steered = [host.generate(PROMPTS, **opts) for _ in range(2)]
    assert torch.equal(*steered) and not torch.equal(steered[0], clean)

    def fails(rows, where):
        raise RuntimeError("no")

    for site in sites:
        with pytest.raises(RuntimeError, match="no"), host.edit(sites[0], lambda rows: rows + 1):
            with host.edit(site, fails, where=True):
                host.generate(PROMPTS, **opts)
        assert host.active_sites() == [] and host.run is None and "step" not in host.pipeline.scheduler.__dict__
    assert count() == before
    assert torch.equal(host.generate(PROMPTS, **opts), clean)


def test_edits_of_one_site_run_in_the_order_in_which_they_were_opened(hosts):
    host, opts = hosts("sd"), options("sd")
    for site in (BLOCK["sd"], "text_encoder.layers.1:out[all]"):
        with host.edit(site, lambda rows: rows + 1), host.edit(site, lambda rows: rows * 2):
            nested = host.generate(PROMPTS, **opts)
        with host.edit(site, lambda rows: (rows + 1) * 2):
            torch.testing.assert_close(nested, host.generate(PROMPTS, **opts), atol=1e-4, rtol=0)


def test_a_direct_call_of_the_pipeline_is_refused_where_its_rows_are_unknown(hosts):
    host = hosts("sd")
    for site in (BLOCK["sd"], "text_encoder.layers.1:out"):
        with host.edit(site, lambda rows: rows + 1), pytest.raises(InputError, match=r"call host\.generate"):
            host.pipeline(PROMPTS[0], num_inference_steps=1, output_type="latent")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"seed": [1]}, "seed has 1 entries for 2 prompts"),
        ({"negative": ["a", "b", "c"]}, "negative has 3 entries for 2 prompts"),
    ],
)
def test_lists_that_do_not_fit(hosts, given, why):
    with pytest.raises(InputError, match=why):
        hosts("sd").generate(**{"prompts": PROMPTS, "steps": 1, **given})


def test_an_edit_must_keep_the_shape(hosts):
    with hosts("sd").edit(BLOCK["sd"], lambda rows: rows[1:]), pytest.raises(InputError, match="returned shape"):
        hosts("sd").generate(PROMPTS, steps=1)
