"""The control that every figure needs: the same SAE, untrained."""

from __future__ import annotations

import copy

import torch

from mmsae.sae.sae import SAE


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
    like = next(sae.parameters())
    return fresh.to(like.device, like.dtype).eval()
