"""SAE-V's scores of one sample: how many latents its image and its text share, and how cross-modal those are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmsae.metrics.pairs.item_codes import check_rows, content_rows, max_pool
from mmsae.types import IMAGE, TEXT, Codes, Tokens

SCORES = ("cos_code", "cos_algorithm", "cos_mean", "l0", "l1", "co_l0", "co_l1")


@torch.no_grad()
def sample_scores(
    codes: Mapping[str, Codes], tokens: Tokens, weights: Tensor | None = None, delta: float = 0.0
) -> dict[str, Tensor]:
    """Scores of the B items of a batch, from their content tokens (``tokens.special`` rows are left out).

    With act(S) the latents above ``delta`` on some token of S, V the image tokens and X the text tokens of an item,
    C = act(V) & act(X), F = act(V) | act(X), and x the largest activation of a latent on the item's tokens:

    - ``l0``, ``l1``: mean over all tokens of the number of active latents (above 0), and of their sum;
    - ``co_l0``: size of C; ``co_l1``: sum over C of the smaller of the two sides' largest activations;
    - ``cos_code``: sum of the weights over C (the authors' code); ``cos_algorithm``: over F (their Algorithm 1);
    - ``cos_mean``: mean weight of F weighted by x (their figure); does not grow with length.

    A latent without weight counts 0. An item without tokens has 0 everywhere.

    Args:
        codes: ``{"image": ..., "text": ...}`` codes of the tokens; a modality may be absent.
        tokens: The tokens, for ``item``, ``special`` and the number of uids.
        weights: ``(d_sae,)`` cross-modal weights, NaN where unknown; without them the three ``cos`` scores are left
            out.
        delta: Bound above which a latent is active, in the units of the codes; 1 in the published code, whose
            activations have another scale.

    Returns:
        ``{name: (B,) float64}``: the scores, and ``n_image`` and ``n_text``, the numbers of content tokens.
    """
    device = next(iter(codes.values())).values.device
    n = len(tokens.uids) if tokens.uids is not None else 1 + max(int(i.max()) for i in tokens.item.values() if len(i))
    zero = torch.zeros(n, dtype=torch.float64, device=device)
    l0, l1, counts, pooled = zero.clone(), zero.clone(), {}, {}
    for m in (IMAGE, TEXT):
        counts[m] = zero.clone()
        if m not in codes:
            continue
        check_rows(codes[m], tokens, m)
        rows = content_rows(tokens, m).nonzero()[:, 0]
        item, own = tokens.item[m][rows], codes[m].rows(rows)
        on = own.values.clamp(min=0).double()
        counts[m].index_add_(0, item, torch.ones_like(item, dtype=torch.float64))
        l0.index_add_(0, item, (on > 0).sum(1).double())
        l1.index_add_(0, item, on.sum(1))
        pooled[m] = max_pool(own, item).above(delta)
    total = sum(counts.values())
    out = {"l0": l0 / total.clamp(min=1), "l1": l1 / total.clamp(min=1)}
    w = None if weights is None else weights.to(device).double().nan_to_num(0)

    def summed(item: Tensor, value: Tensor) -> Tensor:
        return zero.index_add(0, item, value.double())

    out |= {"co_l0": zero, "co_l1": zero} | ({} if w is None else {"cos_code": zero})
    either = next(iter(pooled.values()))
    if len(pooled) == 2:
        v, x = pooled[IMAGE], pooled[TEXT]
        iv, ix = v.common(x)
        item = v.item[iv]
        out["co_l0"] = summed(item, torch.ones_like(iv))
        out["co_l1"] = summed(item, torch.minimum(v.value[iv], x.value[ix]))
        if w is not None:
            out["cos_code"] = summed(item, w[v.latent[iv]])
        either = v.union(x)
    if w is not None:
        own = w[either.latent]
        out["cos_algorithm"] = summed(either.item, own)
        mass = summed(either.item, either.value)
        out["cos_mean"] = summed(either.item, own * either.value) / torch.where(mass > 0, mass, 1.0)
    return {**out, "n_image": counts[IMAGE], "n_text": counts[TEXT]}
