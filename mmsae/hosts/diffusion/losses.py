"""The loss that a latent diffusion model was trained on, for derivatives by what it computes (g-SAE)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from mmsae.hosts.diffusion.call import FullNoise, Runner
from mmsae.hosts.diffusion.edits import OpenEdit
from mmsae.hosts.gradient import HostLoss
from mmsae.types import IMAGE, TEXT, ImageTextBatch, InputError

#: What a denoiser may predict of latents ``x`` and noise ``n`` of the shares ``a`` and ``1 - a`` of the variance: the
#: noise (arXiv 2006.11239), or the velocity (arXiv 2202.00512).
_TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x, n, a: n,
    "v_prediction": lambda x, n, a: a.sqrt() * n - (1 - a).sqrt() * x,
}


def why_not(runner: Runner) -> str:
    """Why the loss is not offered for a pipeline; empty where it is, as for those built like Stable Diffusion 1.x."""
    config, scheduler = runner.model[runner.denoiser].config, runner.pipeline.scheduler
    more = [n for n in ("addition_embed_type", "class_embed_type", "time_cond_proj_dim") if config.get(n) is not None]
    predicts = scheduler.config.get("prediction_type", "epsilon")
    if runner.denoiser != "unet":
        return "its denoiser is no UNet"
    if list(runner.tokenizers) != ["text_encoder"]:
        return f"it has the text encoders {', '.join(runner.tokenizers) or 'none'}, not one"
    if more:
        return f"its UNet is conditioned on more than text and time ({', '.join(more)})"
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        return f"its scheduler {type(scheduler).__name__} has no alphas_cumprod"
    if predicts not in _TARGETS:
        return f"its scheduler's prediction_type is {predicts}, not one of {', '.join(_TARGETS)}"
    return ""


class Denoising(NamedTuple):
    """Squared error of a denoiser at one noise level per image (latent diffusion, arXiv 2112.10752).

    Time, noise and the sample of the autoencoder's posterior come from a generator of the item's own, on the CPU, so
    that an item has the same ones in every batch and on every device.
    """

    runner: Runner  #: The pipeline.
    edits: Sequence[OpenEdit] = ()  #: Those that are open.
    seed: int = 0  #: With an item's uid, the seed of its draws.

    def objective(self) -> HostLoss:
        """The loss; a pipeline for which it is not offered is refused."""
        if why := why_not(self.runner):
            name = type(self.runner.pipeline).__name__
            raise InputError(f"gradient 'diffusion' is not offered for {name}: {why}")
        return HostLoss("diffusion", lambda _, batch: self.terms(batch), (IMAGE, TEXT), transform=self.transform())

    def transform(self) -> Callable[[Image], Tensor]:
        """PIL image to ``(3, H, W)`` in [-1, 1], cropped to the size of the images that the pipeline draws."""
        return partial(_fitted, *(s * self.runner.pipeline.vae_scale_factor for s in self.runner.latent_size))

    def terms(self, batch: ImageTextBatch) -> Tensor:
        """``(B,)`` mean squared errors of what is predicted for the noised latents of images, given their texts."""
        if batch.images is None or batch.texts is None:
            raise InputError("gradient diffusion: the batch needs images and texts, it lacks one of them.")
        if windows := [e for e in self.edits if e.steps]:
            at = f"the edit of {windows[0].target} holds at steps {windows[0].steps}"
            raise InputError(f"gradient diffusion: {at}, but the denoiser runs once, without steps.")
        pipeline, device = self.runner.pipeline, self.runner.device
        alphas = pipeline.scheduler.alphas_cumprod.float().cpu()
        draws = [_generator(self.seed, uid) for uid in batch.uids]
        times = torch.cat([torch.randint(len(alphas), (1,), generator=g) for g in draws])
        with torch.no_grad(), FullNoise():
            made = pipeline.vae.encode(batch.images.to(device, pipeline.vae.dtype))
            x = made.latent_dist.sample(draws) if hasattr(made, "latent_dist") else made.latents  # AutoencoderTiny's
            x = x.float() * pipeline.vae.config.scaling_factor
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in draws]).to(device)
        a = alphas[times].view(-1, 1, 1, 1).to(device)
        predicted = self.runner.denoise(a.sqrt() * x + (1 - a).sqrt() * noise, times.to(device), batch.texts)
        target = _TARGETS[pipeline.scheduler.config.get("prediction_type", "epsilon")](x, noise, a)
        return (predicted.float() - target).square().mean((1, 2, 3))


def _generator(seed: int, uid: str) -> torch.Generator:
    """An item's own generator, the same in every process."""
    digest = hashlib.blake2b(f"{seed}\0{uid}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _fitted(height: int, width: int, image: Image) -> Tensor:
    """The largest middle part of an RGB image, at a size; no closure, so that worker processes can be given it."""
    from PIL import ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(ImageOps.fit(image, (width, height))).float() / 127.5 - 1
