"""Two gloo processes with uneven data report what one process with all of it reports."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmsae.metrics import CoActivation, CrossModalWeights
from mmsae.types import Codes, Tokens

N, D, K, WIDTH = 40, 9, 3, 4


def everything(items):
    g = torch.Generator().manual_seed(0)
    codes, x = {}, {}
    for m in ("image", "text"):
        values = torch.randint(0, 4, (N, K), generator=g) / 4
        codes[m] = Codes(values, torch.rand(N, D, generator=g).argsort(1)[:, :K], D)
        x[m] = torch.randn(N, WIDTH, generator=g)
    metrics = [
        CrossModalWeights(D, WIDTH, selection="per_modality", n_side=3, delta_quantile=0.2, center=True),
        CrossModalWeights(D, WIDTH, n_pool=8, n_side=3),
        CoActivation(D),
    ]
    for part in items.split(7):
        tokens = Tokens(
            {m: v[part] for m, v in x.items()},
            {m: torch.arange(len(part)) for m in x},
            [f"{int(i) * 7919 % 997:032x}" for i in part],
        )
        for metric in metrics:
            metric.update({m: c.rows(part) for m, c in codes.items()}, tokens)
    a, b, lift = (m.compute() for m in metrics)
    return {
        "weights": a.weights, "delta": torch.tensor(a.delta), "pooled": b.weights, "evidence": b.evidence["text"],
        "fired": a.fired["image"], "lift": lift.lift, "p": lift.p,
    }  # fmt: skip


def rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(everything(torch.arange(N)[rank * 27 :][:27]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    want = everything(torch.arange(N))
    mp.start_processes(rank_main, (str(tmp_path),), nprocs=2, start_method="spawn")
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)
    assert want["weights"].isfinite().any() and want["pooled"].isfinite().any()
