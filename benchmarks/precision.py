"""What the precision of the encoder's product changes in a TopK SAE that is trained with it.

    mmsae extract --host timm:local-dir:HOST --sites 'blocks.6:out[all]' --shards TRAIN.tar --out TRAIN
    mmsae extract --host timm:local-dir:HOST --sites 'blocks.6:out[all]' --shards TEST.tar --out TEST
    python benchmarks/precision.py --train TRAIN --test TEST

Trainings of one seed have the same start and the same batches, so that only near ties differ. *Overlap* is the share of
the latents that a trained SAE chooses by its float32 product which it also chooses by the product of the precision.
"""

import argparse
import time

import torch

from mmsae.activations import ActivationStore
from mmsae.sae import SAE, AuxK, LossContext, Normaliser, Reconstruction, TopK, UsageTracker


def train(x, options, precision, seed):
    torch.manual_seed(seed)
    sae = SAE(
        x.shape[1],
        ratio=options.ratio,
        modalities=["image"],
        normaliser=Normaliser(centre=True),
        selector=TopK(options.k),
        precision=precision,
    ).to(options.device)
    sae.fit_normaliser({"image": x[: 2**15].to(options.device)})
    usage = UsageTracker(sae.d_sae, sae.modalities).to(options.device)
    terms = [Reconstruction(), AuxK(dead_after=options.dead_after)]
    optimizer = torch.optim.Adam(sae.parameters(), options.lr, fused=True)
    generator, start = torch.Generator().manual_seed(seed), time.process_time()
    for step in range(options.steps):
        rows = torch.randint(len(x), (options.batch,), generator=generator)
        out = sae({"image": x[rows].to(options.device)})
        loss = sum(term(out, LossContext(sae, usage, step / options.steps, step)) for term in terms)
        usage.update({m: o.codes for m, o in out.items()})
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_grad_()
        optimizer.step()
        sae.after_step_()
    return sae.eval(), time.process_time() - start


@torch.no_grad()
def coded(sae, x, precision):
    """Dense reconstruction error and which latents fire, ``(N, d_sae)`` bool."""
    sae.precision = precision
    out = [sae({"image": part.to(next(sae.parameters()).device)})["image"] for part in x.split(4096)]
    error = sum(float((o.target - o.recon).square().sum()) for o in out)
    target = torch.cat([o.target for o in out])
    return error / float((target - target.mean(0)).square().sum()), torch.cat([o.codes.to_dense() != 0 for o in out])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dead-after", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=8192, help="held-out rows")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, held_out = (ActivationStore(folder).load(modality="image") for folder in (options.train, options.test))
    held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[: options.rows]]
    print("| precision | seed | FVU, held out | dead, held out | overlap | FVU of it by fp32 | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for seed in range(options.seeds):
        for precision in options.precisions:
            sae, seconds = train(x, options, precision, seed)
            (fvu, on), (exact_fvu, exact) = (coded(sae, held_out, p) for p in (precision, "fp32"))
            dead, both = 1 - float(on.any(0).float().mean()), float((on & exact).sum() / exact.sum())
            print(
                f"| {precision} | {seed} | {fvu:.4f} | {dead:.3f} | {both:.4f} | {exact_fvu:.4f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
