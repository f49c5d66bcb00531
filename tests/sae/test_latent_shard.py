"""Two gloo processes that share the latents of an SAE do what one with all of them does."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmsae import SAE
from mmsae.sae import (
    AffineEncoder,
    AuxK,
    BatchTopK,
    Dictionary,
    DistanceEncoder,
    JumpReLU,
    LossContext,
    Normaliser,
    PerModalityEncoder,
    Reconstruction,
    TopK,
    UsageTracker,
)
from mmsae.sae.latent_shard import LatentShard, share_latents_
from mmsae.sae.latents import latent_axes
from mmsae.types import InputError

D, F, N, STEPS, WORLD = 12, 64, 40, 12, 2
BOTH, ONE = ("image", "text"), ("image",)


def unit():
    return Normaliser(unit_in=True, centre=True, unit_out=True)


#: Parts of an SAE, made anew each time.
KINDS = {
    "topk": lambda: SAE(modalities=ONE, d_sae=F, selector=TopK(5)),
    "fewer latents than k on a rank": lambda: SAE(modalities=ONE, d_sae=F, selector=TopK(40)),
    "a dictionary each": lambda: SAE(
        d_sae=F, normaliser=unit(), selector=TopK(5), dictionaries={m: Dictionary() for m in BOTH}
    ),
    "an encoder each": lambda: SAE(d_sae=F, encoder=PerModalityEncoder(AffineEncoder()), selector=TopK(5)),
    "distance": lambda: SAE(
        d_sae=F, encoder=DistanceEncoder(), selector=TopK(5), dictionaries={"shared": Dictionary("free")}
    ),
    "batch_topk": lambda: SAE(d_sae=F, normaliser=unit(), selector=BatchTopK(5)),
}


def rows(step):
    g = torch.Generator().manual_seed(step)
    return {m: torch.randn(N, D, generator=g) + i for i, m in enumerate(BOTH)}


def made(kind):
    torch.manual_seed(0)
    sae = KINDS[kind]().build(dict.fromkeys(BOTH, D))
    with torch.no_grad():  # a quarter of the latents never fires, on both ranks, so that AuxK has something to do
        for name, p in sae.encoder.named_parameters():
            if name.endswith("bias"):
                p[::4] = -30.0
    sae.fit_normaliser({m: torch.cat([rows(s)[m] for s in range(4)]) for m in sae.modalities})
    return sae


def train(sae):
    """What every step computes, and the SAE after the last."""
    shard = sae.shard
    usage = UsageTracker(sae.d_sae, sae.modalities, apart=shard is not None)
    terms, said = [Reconstruction(), AuxK(dead_after=2 * N, k_aux=7)], []
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    sae.train()
    for step in range(STEPS):
        outputs = sae({m: rows(step)[m] for m in sae.modalities})
        losses = [term(outputs, LossContext(sae, usage, step / STEPS, step)) for term in terms]
        optimizer.zero_grad()
        sum(losses).backward()
        sae.remove_parallel_grad_()
        optimizer.step()
        usage.update({m: out.codes for m, out in outputs.items()})
        sae.after_step_()
        codes = {m: out.codes if shard is None else shard.codes(out.codes) for m, out in outputs.items()}
        said.append({
            "loss": [float(x.detach()) for x in losses],
            "on": {m: c.to_dense().detach() != 0 for m, c in codes.items()},
            "x_hat": {m: out.x_hat.detach() for m, out in outputs.items()},
        })  # fmt: skip
    sae.eval()
    with torch.no_grad():
        out = sae({m: rows(99)[m] for m in sae.modalities})
    evaluated = {m: (o.codes if shard is None else shard.codes(o.codes)).to_dense().detach() for m, o in out.items()}
    biases = {name: p.detach() for name, p in sae.named_parameters() if shard is None or name not in shard.axes}
    if shard is not None:
        sae, usage = shard.whole(sae), shard.whole_usage(usage)
    state = sae and {"sae": sae.state_dict(), "usage": usage.state_dict(), "d_sae": sae.d_sae}
    return {"said": said, "evaluated": evaluated, "biases": biases, "state": state}


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.save({kind: train(share_latents_(made(kind))) for kind in KINDS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(rank_main, (str(folder),), nprocs=WORLD, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_share_latents_train_as_one(two, kind):
    want, (a, b) = train(made(kind)), (found[kind] for found in two)
    assert (want["said"][3]["loss"][1] > 0) == (kind != "distance"), "AuxK has something to do, where there is a bias"
    for step, (one, first, second) in enumerate(zip(want["said"], a["said"], b["said"], strict=True)):
        assert first["loss"] == second["loss"] == pytest.approx(one["loss"], rel=2e-5), step
        for m, on in one["on"].items():
            assert torch.equal(first["on"][m], on) and torch.equal(second["on"][m], on), step
        for m, x_hat in one["x_hat"].items():
            torch.testing.assert_close(first["x_hat"][m], x_hat, atol=1e-4, rtol=1e-4)
            assert torch.equal(first["x_hat"][m], second["x_hat"][m])
    assert b["state"] is None and a["state"]["d_sae"] == F
    for part in ("sae", "usage"):
        assert a["state"][part].keys() == want["state"][part].keys()
        for name, value in want["state"][part].items():
            torch.testing.assert_close(a["state"][part][name], value, atol=1e-4, rtol=1e-4)
    assert a["biases"].keys() == b["biases"].keys() and a["biases"]
    assert all(torch.equal(v, b["biases"][name]) for name, v in a["biases"].items())
    for m, dense in want["evaluated"].items():
        torch.testing.assert_close(a["evaluated"][m], dense, atol=1e-4, rtol=1e-3)


def alone(monkeypatch, world=2):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_has_its_share_of_every_tensor_of_latents(kind, monkeypatch):
    sae = made(kind)
    alone(monkeypatch)
    whole, axes = copy.deepcopy(sae), latent_axes(sae)
    share_latents_(sae)
    assert sae.shard.axes == {name: found[0] for name, found in axes.items()} and sae.d_sae == F // 2
    for name, value in sae.state_dict().items():
        want = whole.state_dict()[name]
        assert torch.equal(value, want.narrow(sae.shard.axes[name], F // 2, F // 2) if name in axes else want)
    assert sum(p.numel() for p in sae.parameters()) < 0.6 * sum(p.numel() for p in whole.parameters())
    for ask in (lambda: sae.encode(rows(0)["image"], "image"), lambda: sae.save_pretrained("nowhere")):
        with pytest.raises(InputError, match="2 ranks share the 64 latents of this SAE"):
            ask()


def test_equal_candidates_are_taken_from_the_first_latents(monkeypatch):
    alone(monkeypatch)
    shard = LatentShard(8, {})
    first = torch.tensor([[1.0, 3.0, 3.0], [5.0, 5.0, 5.0]])
    monkeypatch.setattr(shard, "_of_all", lambda mine: [first, mine])
    on = shard._largest(torch.tensor([[3.0, 3.0, 0.0], [5.0, 6.0, 5.0]]), 3)
    assert on.tolist() == [[True, False, False], [False, True, False]]


def test_what_cannot_share_latents_is_refused(monkeypatch):
    with pytest.raises(InputError, match="there is none"):
        share_latents_(SAE(D, F, modalities=ONE, selector=TopK(5)))
    alone(monkeypatch, world=3)
    for parts, words in (
        ({"selector": TopK(5)}, "64 latents cannot be shared evenly among 3 ranks"),
        ({"selector": JumpReLU()}, "selector 'jumprelu' cannot share its latents among ranks, as topk, batch_topk can"),
        ({"selector": TopK(5, strict=True)}, "selector 'topk' with strict"),
        ({"selector": TopK(5, score="abs")}, "selector 'topk' with score 'abs'"),
    ):
        with pytest.raises(InputError, match=words):
            share_latents_(SAE(D, F, modalities=ONE, **parts))
