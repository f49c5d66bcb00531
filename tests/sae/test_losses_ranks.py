"""Terms that couple the rows of a batch: two gloo processes have the value and gradient of one with all rows."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmsae.sae import CodeInfoNCE, EnergyMatch
from tests.helpers.pairs import context, outputs_of, random_codes

TERMS = {
    "energy": EnergyMatch(1.0),
    "pairs": EnergyMatch(1.0, by="pairs"),
    "cosine": CodeInfoNCE(1.0),
    "product": CodeInfoNCE(1.0, normalise=False),
}


def everything(rows):
    """``{term: (value, gradient of two weights that all rows share)}``."""
    out = {}
    for name, term in TERMS.items():
        for sparse in (True, False):
            scale = torch.ones(2, 12, requires_grad=True)
            z, w = (random_codes(seed=i)[rows] * scale[i] for i in (0, 1))
            loss = term(outputs_of(z, w, sparse=sparse), context(12))
            out[f"{name} {sparse}"] = loss.detach(), torch.autograd.grad(loss, scale)[0]
    return out


def rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(everything(torch.arange(40)[rank::2]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_mean_over_ranks_is_what_one_process_has():
    want = everything(torch.arange(40))
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank_main, (folder,), nprocs=2, start_method="spawn")
        got = [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
    for name, (value, grad) in want.items():
        for i, full in enumerate((value, grad)):
            mean = (got[0][name][i] + got[1][name][i]) / 2
            torch.testing.assert_close(mean, full, rtol=1e-4, atol=1e-6, msg=name)
