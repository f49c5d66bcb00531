"""A diffusion host of ten lines whose every number is known, and an SAE whose latents are its axes."""

from contextlib import contextmanager

import torch

from mmsae import SAE
from mmsae.hosts.sites import COND, UNCOND, Where
from mmsae.sae import AffineEncoder, Dictionary, TopK
from mmsae.types import InputError, Site

COLOURS = ("red", "green", "blue")  # channels of the picture, axes 0, 1, 2 of the site
SIDE, WIDTH = 4, 8
SITE = Site("toyhost", "block", "out", "all", "image", WIDTH, "toy")


class ToyDiffusion:
    """``red left`` is a red left half on a ground of noise; pictures are means over steps of the guided states.

    The site holds ``(2 * B) * 16`` rows of width 8 with guidance and ``B * 16`` without: axis 0 to 2 is the amount of
    a colour, axes 3 to 7 are noise that no picture shows but axis 3, which is brightness.
    """

    fingerprint, hint, modalities, precision = "toyhost", "toy", ("image",), "fp32"

    def __init__(self):
        self.fns, self.calls = [], []
        self.model = torch.nn.Linear(1, 1)

    def site(self, spec, allow_other_site=False):
        if isinstance(spec, Site) or spec.startswith("block"):
            return SITE
        raise InputError(f"host toy has no module {spec!r}")

    def check_consumed(self, site):
        self.site(site)

    def active_sites(self):
        return [SITE] * len(self.fns)

    @contextmanager
    def edit(self, site, fn, *, where=False, steps=None):
        self.site(site)
        assert where
        self.fns.append((fn, steps or (0, 10**9)))
        try:
            yield
        finally:
            self.fns.pop()

    def _states(self, prompts):
        out = torch.zeros(len(prompts), SIDE, SIDE, WIDTH)
        for i, text in enumerate(prompts):
            words = text.split()
            columns = slice(0, 2) if "left" in words else slice(2, 4) if "right" in words else slice(0, 4)
            for c, colour in enumerate(COLOURS):
                if colour in words:
                    out[i, :, columns, c] = 1.0
        return out.flatten(1, 2)

    def generate(self, prompts, *, negative=None, steps=4, guidance=1.0, seed=0, batch_size=8):
        if late := [s for _, s in self.fns if steps < s[1] < 10**9]:
            raise InputError(f"the edit holds at steps {late[0]}, but the schedule has {steps} steps")
        self.calls.append((list(prompts), seed, steps, guidance))
        n = len(prompts)
        seeds = [seed] * n if isinstance(seed, int) else seed
        noise = torch.stack([torch.rand(16, WIDTH, generator=torch.Generator().manual_seed(s)) for s in seeds]) * 0.1
        total, halves = 0.0, 1 + (guidance > 1)
        for step in range(steps):
            h = noise + self._states(prompts)
            if halves == 2:
                h = torch.cat([noise, h])
            rows = h.flatten(0, 1)
            branch = torch.tensor([UNCOND, COND])[-halves:].repeat_interleave(n * 16)
            item = torch.arange(n).repeat_interleave(16).repeat(halves)
            where = Where(item, torch.arange(16).repeat(n * halves), grid=(4, 4), branch=branch, step=step)
            for fn, (start, end) in self.fns:
                rows = fn(rows, where) if start <= step < end else rows
            h = rows.view(-1, 16, WIDTH)
            if halves == 2:
                h = h[:n] + guidance * (h[n:] - h[:n])
            total = total + h
        mean = total / steps
        return (mean[..., :3] + mean[..., 3:4]).transpose(1, 2).reshape(n, 3, SIDE, SIDE).clamp(0, 1)


def toy_sae(k=3):
    """Latent i is axis i."""
    parts = {"encoder": AffineEncoder(bias=False, subtract_decoder_bias=False), "selector": TopK(k)}
    sae = SAE(WIDTH, d_sae=WIDTH, modalities=("image",), dictionaries={"shared": Dictionary(bias=False)}, **parts)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(WIDTH))
        sae.dictionaries["shared"].weight.copy_(torch.eye(WIDTH))
    sae.sites = {"image": SITE}
    return sae.requires_grad_(False)


def amount(colour):
    """A scorer: mean of one channel."""
    return lambda images, prompts: images[:, COLOURS.index(colour)].mean((1, 2))
