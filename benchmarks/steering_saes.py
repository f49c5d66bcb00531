"""SAEs of the tiny text-to-image pipeline for ``benchmarks/steering.py``: on its text encoder, and on one block."""

from pathlib import Path

import torch

from mmsae import SAE
from mmsae.sae import AuxK, LossContext, Normaliser, Reconstruction, TopK, UsageTracker
from mmsae.steering.methods.text import text_batch
from mmsae.world.generator.captions import full_captions, partial_captions
from mmsae.world.generator.scene import sample_scenes

TEXT_SITE = "text_encoder.final_layer_norm:out[mask]"


def captions(n: int, seed: int) -> list[str]:
    """Captions of lone objects, half of them partial."""
    scenes = sample_scenes(4 * n, seed, siblings=False)
    scenes = scenes.rows(~scenes.two)
    texts = dict.fromkeys([*full_captions(scenes)[: n // 2], *partial_captions(scenes, seed)[-(n - n // 2) :]])
    return list(texts)[:n]


def train(rows: torch.Tensor, site, d_sae=256, k=8, steps=800, seed=0, batch=512, lr=3e-3) -> SAE:
    """A top-k SAE on rows in memory."""
    torch.manual_seed(seed)
    m = site.modality
    sae = SAE(
        {m: site.width}, d_sae, modalities=(m,), selector=TopK(k), normaliser=Normaliser(centre=True, scale="rms")
    )
    sae.sites = {m: site}
    sae.fit_normaliser({m: rows[:: max(1, len(rows) // 8192)]})
    losses, usage = [Reconstruction(), AuxK(k_aux=32, dead_after=25 * batch)], UsageTracker(d_sae, (m,))
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 50, 3 * (1 - s / steps)))
    for step in range(steps):
        outputs = sae({m: rows[torch.randint(len(rows), (batch,))]})
        context = LossContext(sae, usage, progress=step / steps)
        loss = torch.stack([term(outputs, context) for term in losses]).sum()
        usage.update({m: out.codes for m, out in outputs.items()})
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_grad_()
        optimizer.step()
        sae.project_()
        schedule.step()
    return sae.eval().requires_grad_(False)


def fvu(sae: SAE, rows: torch.Tensor) -> float:
    """Share of the variance about the mean that is not reconstructed."""
    [m] = sae.modalities
    error = (sae.decode(sae.encode(rows, m), m) - rows).double().square().sum()
    return (error / (rows - rows.mean(0)).double().square().sum()).item()


def text_rows(host, texts: list[str]) -> torch.Tensor:
    """``(N, d)`` states of content tokens (and BOS and EOS, where there are any)."""
    return host.capture(text_batch(host, texts), [TEXT_SITE]).x["text"]


def block_rows(host, site: str, texts: list[str], per_step: int = 10, **options) -> torch.Tensor:
    """``(N, d)`` states of a block while prompts are drawn, conditional half."""
    found = host.stream(texts, site, sample_steps=per_step, batch_size=32, seed=list(range(len(texts))), **options)
    return torch.cat([t.x["image"] for t in found])


def load_or_train(folder: Path, make) -> SAE:
    """The SAE in a folder, made where there is none."""
    if not (folder / "cfg.json").exists():
        make().save_pretrained(folder)
    return SAE.from_pretrained(folder)
