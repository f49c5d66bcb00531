"""Training-step time against the naive forms, interleaved in one process.

    python benchmarks/sae_step.py            # both cases below, one thread
    python benchmarks/sae_step.py --rounds 15 --threads 2

* ``vl_sae``: d 512, H 4096, k 256, B 512, both modalities, against the published model's step: ``cdist``, a
  ``kthvalue`` mask and dense decoders, with dense autograd and Adam.
* ``topk``: d 512, H 8192, k 32, B 2048, one modality, against a dense minimal TopK step.

Rounds alternate between the two; the figure is the median of paired ratios of CPU time. The floor is the time of the
one dense product that no exact step can avoid (the encoder's), measured in the same run.
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn

from mmsae.kernels.plain import linear
from mmsae.sae import SAE, AffineEncoder, Dictionary, DistanceEncoder, LossContext, Reconstruction, TopK


class NaiveVLSAE(nn.Module):
    """The published form, dense everywhere."""

    def __init__(self, d, h, k):
        super().__init__()
        self.encoder = nn.Parameter(torch.empty(h, d).uniform_(-(d**-0.5), d**-0.5))
        self.decoders = nn.ModuleDict({m: nn.Linear(h, d) for m in ("image", "text")})
        self.k = k

    def loss(self, x):
        total = 0.0
        for m, v in x.items():
            w = nn.functional.normalize(self.encoder, dim=1)
            a = 2 - torch.cdist(nn.functional.normalize(v, dim=1), w)
            threshold = a.detach().kthvalue(a.shape[1] - self.k, dim=1, keepdim=True).values
            total = total + nn.functional.mse_loss(self.decoders[m](a * (a > threshold)), v)
        return total


class NaiveTopK(nn.Module):
    """A dense minimal TopK step."""

    def __init__(self, d, h, k):
        super().__init__()
        self.w = nn.Parameter(nn.functional.normalize(torch.randn(h, d)))
        self.b = nn.Parameter(torch.zeros(h))
        self.dec = nn.Linear(h, d)
        self.k = k

    def loss(self, x):
        v = x["image"]
        u = (v - self.dec.bias) @ self.w.t() + self.b
        top = u.topk(self.k)
        z = torch.zeros_like(u).scatter(1, top.indices, top.values.relu())
        return (self.dec(z) - v).square().sum(1).mean()


def naive_step(model, optimizer, x):
    optimizer.zero_grad()
    loss = model.loss(x)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def our_step(sae, term, optimizer, x):
    optimizer.zero_grad()
    loss = term(sae(x), LossContext(sae))
    loss.backward()
    sae.remove_parallel_grad_()
    optimizer.step()
    sae.project_()
    return float(loss.detach())


def build(case):
    torch.manual_seed(0)
    if case == "vl_sae":
        d, h, k, b = 512, 4096, 256, 512
        naive = NaiveVLSAE(d, h, k)
        dictionaries = {m: Dictionary(norm="free") for m in ("image", "text")}
        sae = SAE(d, h, encoder=DistanceEncoder(), selector=TopK(k), dictionaries=dictionaries)
        with torch.no_grad():  # the same model on both sides, so that the losses can be compared
            sae.encoder.weight.copy_(naive.encoder)
            for m, dec in naive.decoders.items():
                sae.dictionaries[m].weight.copy_(dec.weight.t())
                sae.dictionaries[m].bias.copy_(dec.bias)
        x = {m: torch.randn(b, d) for m in ("image", "text")}
        return naive, sae, Reconstruction("mse"), x
    d, h, k, b = 512, 8192, 32, 2048
    naive = NaiveTopK(d, h, k)
    sae = SAE(
        d, h, modalities=["image"], encoder=AffineEncoder(), selector=TopK(k), dictionaries={"shared": Dictionary()}
    )
    with torch.no_grad():
        naive.dec.weight.copy_(sae.dictionaries["shared"].weight.t())
        naive.dec.bias.zero_()
        naive.w.copy_(sae.encoder.weight)
    return naive, sae, Reconstruction("sum"), {"image": torch.randn(b, d)}


def timed(fn):
    start = time.process_time()
    value = fn()
    return time.process_time() - start, value


def run(case, rounds):
    naive, sae, term, x = build(case)
    slow, fast = torch.optim.Adam(naive.parameters(), 1e-4), torch.optim.Adam(sae.parameters(), 1e-4, fused=True)

    def floor():
        with torch.no_grad():
            for v in x.values():
                for part in v.split(256):
                    linear(part, sae.encoder.weight, None)

    rows = []
    for _ in range(rounds + 2):
        a, loss_a = timed(lambda: naive_step(naive, slow, x))
        b, loss_b = timed(lambda: our_step(sae, term, fast, x))
        c, _ = timed(floor)
        rows.append((a, b, c, loss_a, loss_b))
    first = rows[0]
    rows = rows[2:]
    median = lambda values: statistics.median(values)  # noqa: E731
    return {
        "case": case,
        "naive_ms": 1e3 * median(r[0] for r in rows),
        "mmsae_ms": 1e3 * median(r[1] for r in rows),
        "floor_ms": 1e3 * median(r[2] for r in rows),
        "speedup": median(r[0] / r[1] for r in rows),
        "over_floor": median(r[1] / r[2] for r in rows),
        "first_loss_relative_difference": abs(first[3] - first[4]) / first[3],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", default=["vl_sae", "topk"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for case in args.cases:
        print(
            json.dumps({k: v if isinstance(v, str) else float(f"{v:.4g}") for k, v in run(case, args.rounds).items()})
        )
