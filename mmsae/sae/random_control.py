"""The control that every figure needs: the same SAE, untrained."""

from __future__ import annotations

import copy
import math

import torch
from torch.nn.functional import normalize

from mmsae.sae.sae import SAE
from mmsae.sae.selector import SelectContext
from mmsae.sae.variants.batch_topk import Thresholded


def random_control(sae: SAE, seed: int = 0) -> SAE:
    """An SAE of the same composition, size and normaliser, with fresh random weights, as a training would start.

    Random codes look better than intuition says (on the generated world a random TopK of 128 latents retrieves .7 of
    the pairs), so a figure means something only beside this one's.
    """
    fresh = copy.deepcopy(sae)
    statistics = copy.deepcopy(sae.normaliser.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        fresh.build(sae.d_in, sae.d_sae)
    fresh.normaliser.load_state_dict(statistics)
    if not fresh.normaliser.centre:
        # as a training starts; an SAE that does not know the mean (imported) has its own bias in the mean's place
        means = {m: (sae.normaliser.mean(m), sae.dictionary(m).bias) for m in sae.modalities}
        fresh.start_at_({m: mean if own is None or mean.any() else own for m, (mean, own) in means.items()})
    like = next(iter(sae.dictionaries.values())).like
    fresh = fresh.to(like.device, like.dtype)
    if isinstance(fresh.selector, Thresholded):
        _first_thresholds(fresh, seed)
    return fresh.eval()


@torch.no_grad()
def _first_thresholds(sae: SAE, seed: int) -> None:
    """Thresholds as a training's first batch would give them, of Gaussian rows about the mean of equal total variance.

    A selector whose budget is that of a batch codes by thresholds after training, and has none before.
    """
    n = max(1024, math.ceil(2 * sae.d_sae / sae.selector.k)) if hasattr(sae.selector, "k") else 1024
    generator, normaliser = torch.Generator().manual_seed(seed), sae.normaliser
    sae.train()
    for m, d in sae.d_in.items():
        like, variance = normaliser.mean(m), normaliser.variance(m).nan_to_num(1.0)
        rows = torch.randn(n, d, generator=generator).to(like) * (variance / d).sqrt()
        rows = rows if normaliser.centre else rows + like
        rows = normalize(rows) if normaliser.unit_out else rows
        dictionary = sae.dictionary(m)
        sae.selector(sae.encoder(rows, dictionary, m), SelectContext(m, dictionary, rows))
