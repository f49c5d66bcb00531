"""The control that every figure needs: the same SAE, untrained, and as sparse as the trained one."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmsae.sae.sae import SAE
from mmsae.sae.selector import ReLU, SelectContext
from mmsae.sae.transform import CHUNK, by_thresholds, to_jumprelu
from mmsae.sae.variants.batch_topk import Thresholded
from mmsae.sae.variants.jumprelu import JumpReLU
from mmsae.types import InputError

BLOCK = 2**25  # pre-codes that are held at once: (rows, some latents) in float32


def random_control(sae: SAE, seed: int = 0, rows: Mapping[str, Tensor] | None = None) -> SAE:
    """An SAE of the same composition, size and normaliser, with fresh random weights, as a training would start.

    Random codes look better than intuition says (on the generated world a random TopK of 128 latents retrieves .7 of
    the pairs), so a figure means something only beside this one's.

    Selectors with a budget (TopK, BatchTopK and their kin) keep as many latents as the trained SAE. Those that go by a
    threshold of each latent have learned how sparse they are, and fresh ones have not: a JumpReLU SAE that fires 8
    latents a row has a control that fires half of them all, and neither such a control nor random weights under trained
    thresholds are to be compared with it. Given ``rows``, every latent of the control has the threshold by which it
    fires on as many of them as the trained one of its place does: the two then have equal densities, latent by latent,
    and the same latents are silent.

    Args:
        sae: A trained SAE.
        seed: Seed of the weights.
        rows: ``{modality: (N, d) raw activations}``, such as it was trained on; of any modalities, others keep the
            thresholds of a start. Selectors with a budget do not read them. A latent that fires on more rows than a
            random one is positive on (half of them) has a threshold of 0.

    Raises:
        InputError: A modality whose rows are none.
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
    fresh.eval()
    return _as_often(fresh, sae, rows) if rows and needs_rows(sae) else fresh


def needs_rows(sae: SAE) -> bool:
    """Whether a control of this SAE is as sparse as it only if it has seen rows: it has no budget, but thresholds."""
    return isinstance(sae.selector, JumpReLU | ReLU)


def without_rows(sae: SAE) -> list[str]:
    """What is to be said of a control that has seen no rows, where that makes it no fair one."""
    if not needs_rows(sae):
        return []
    return [f"control random: selector {sae.selector.name} has no budget, and no rows were at hand that say how sparse "
            "random weights must be: they fire by the thresholds of a start, far more often than the SAE"]  # fmt: skip


@torch.no_grad()
def _as_often(fresh: SAE, sae: SAE, rows: Mapping[str, Tensor]) -> SAE:
    """``fresh`` with thresholds by which its latents fire on as many of the rows as those of ``sae``."""
    start = to_jumprelu(fresh)
    theta = {m: start.selector.threshold(m) for m in sae.modalities}
    for m, x in rows.items():
        if not len(x):
            raise InputError(f"no {m} rows to learn from how often the latents of a control are to fire")
        theta[m] = _quantiles(fresh, x, m, _fired(sae, x, m))
    return by_thresholds(fresh, theta)


def _fired(sae: SAE, x: Tensor, modality: str) -> Tensor:
    """``(d_sae,)`` number of rows on which each latent fires."""
    out = torch.zeros(sae.d_sae, dtype=torch.int64)
    for part in x.split(CHUNK):
        codes = sae.encode(part, modality)
        on = codes.values != 0
        out += on.sum(0).cpu() if codes.indices is None else codes.indices[on].bincount(minlength=sae.d_sae).cpu()
    return out


def _quantiles(sae: SAE, x: Tensor, modality: str, fired: Tensor) -> Tensor:
    """``(d_sae,)`` thresholds above which the pre-codes of ``fired (d_sae,)`` of the rows lie, in the middle between
    two; at least 0, infinite where none is to be above.
    """
    like, n = sae.dictionary(modality).like, len(x)
    theta, size = torch.full((sae.d_sae,), torch.inf), max(1, BLOCK // n)
    live = fired.nonzero()[:, 0]
    for ids in live.split(size):
        pres = (sae._pre(part.to(like.device), modality)[0] for part in x.split(CHUNK))
        ordered = torch.cat([pre.columns(ids.to(like.device)).cpu() for pre in pres]).sort(0, descending=True).values
        least = ordered.gather(0, fired[None, ids] - 1)[0]
        below = ordered.gather(0, fired[None, ids].clamp(max=n - 1))[0]
        theta[ids] = torch.where(fired[ids] < n, (least + below) / 2, 0).clamp(min=0)
    return theta.to(like)


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
