"""``mmsae control``: an SAE of random weights as a folder, beside which whatever takes ``--control`` reads figures."""

from __future__ import annotations

from pathlib import Path

from mmsae.errors import InputError


def control(sae: str, out: str, store: str = "", rows: int = 20_000, seed: int = 0) -> Path:
    """Write the control of an SAE: one of the same parts, sizes and normaliser with random weights.

    Collect evidence of both in one pass (mmsae evidence --sae SAE CONTROL --out A B) and name it in --control of name,
    score and explore. SAEs without a budget (ReLU, JumpReLU, also those that mmsae.sae.to_jumprelu made of TopK) need
    --store: each latent of their control fires on as many of its rows as the trained one does.

    Args:
        sae: SAE folder or hub id.
        out: Folder of the control; an SAE that lies there is replaced.
        store: Store of activations of the SAE's sites, such as it was trained on (mmsae extract).
        rows: How many of them say how often each latent fires, of every modality, drawn by the seed.
        seed: Seed of the weights.

    Returns:
        The folder.

    Raises:
        InputError: No SAE, a store of another host or site, or no store where one is needed.
    """
    import numpy as np

    from mmsae.activations import ActivationStore
    from mmsae.options import at_least
    from mmsae.sae import SAE, random_control
    from mmsae.sae.random_control import needs_rows

    at_least(1, rows=rows)
    if Path(out).resolve() == Path(sae).resolve():
        raise InputError(f"out is {out}, the SAE itself: its control needs a folder of its own")
    trained, given = SAE.from_pretrained(sae), {}
    if needs_rows(trained) and not store:
        raise InputError(
            f"selector {trained.selector.name!r} of SAE {sae} keeps what is above a threshold: name rows by which the "
            "control is made as sparse (--store)"
        )
    if store and needs_rows(trained):
        found, rng = ActivationStore(store), np.random.default_rng(seed)
        for m in trained.modalities:
            name = found.spec.own(m, trained.sites)
            if m in trained.sites:
                trained.sites[m].refuse_other(found.spec.sites[name])
            n = found.spec.rows[name]
            given[m] = found.rows(name, np.sort(rng.permutation(n)[:rows]))
    made = random_control(trained, seed, given)
    folder = made.save_pretrained(out)
    said = ", ".join(f"{m} {_l0(trained, x, m)} and {_l0(made, x, m)}" for m, x in given.items())
    print(f"control: random weights of seed {seed}" + (f"; latents a row, trained and random: {said}" if said else ""))
    return folder


def _l0(sae, x, modality: str) -> str:
    parts = [sae.encode(part, modality).l0().float() for part in x.split(8192)]
    return f"{sum(float(p.sum()) for p in parts) / len(x):.1f}"
