"""Two gloo processes with uneven data report what one process with all of it reports."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmsae.metrics import CrossCorrelation, ReconstructionMetrics, Sparsity, TopN
from mmsae.types import Codes

N, D, K, WIDTH = 70, 9, 3, 4


def everything(rows):
    """All streaming metrics over some rows of one fixed data set, in batches of 8."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, WIDTH, generator=g) + 3
    x_hat = x + 0.2 * torch.randn(N, WIDTH, generator=g)
    codes = [
        Codes(torch.randint(0, 4, (N, K), generator=g) / 4, torch.rand(N, D, generator=g).argsort(1)[:, :K], D)
        for _ in range(2)
    ]
    uids = [f"{i * 7919 % 997:032x}" for i in range(N)]
    metrics = (ReconstructionMetrics({"image": WIDTH}), Sparsity(D), CrossCorrelation(D), TopN(D, 4))
    for part in rows.split(8):
        metrics[0].update({"image": x_hat[part]}, {"image": x[part]})
        metrics[1].update(codes[0].rows(part))
        metrics[2].update(codes[0].rows(part), codes[1].rows(part))
        metrics[3].update(codes[0].rows(part), [uids[i] for i in part])
    fvu, sparse, corr, top = (m.compute() for m in metrics)
    return {**fvu, **sparse._asdict(), "corr": corr, "top": [top.top(j) for j in range(D)], "fired": top.n_fired}


def rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(everything(torch.arange(N)[rank * 45 :][:45]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one():
    want = everything(torch.arange(N))
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank_main, (folder,), nprocs=2, start_method="spawn")
        for rank in range(2):
            got = torch.load(f"{folder}/{rank}.pt")
            assert got.keys() == want.keys()
            for name, value in want.items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)
                else:
                    assert got[name] == value, name
