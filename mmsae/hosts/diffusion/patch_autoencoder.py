"""A linear autoencoder of image patches for latent diffusion at the size of a toy: fitted in closed form, no training.

diffusers loads a pipeline folder with a component class of one's own only where that class's module has been imported:
import this one (``load_host("diffusers:...")`` does) before ``StableDiffusionPipeline.from_pretrained``.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from mmsae.types import InputError


class PointPosterior:
    """What ``encode`` returns as ``latent_dist``: all mass on one point, latents ``(B, C, h, w)``."""

    def __init__(self, z: Tensor):
        self.mean = z

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The point."""
        return self.mean

    def mode(self) -> Tensor:
        """The point."""
        return self.mean


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Principal components of patches: latents ``(B, C, H / patch, W / patch)`` of images in [-1, 1].

    The mean that is subtracted has one value a colour channel; a mean patch would leave its grid in generated images
    wherever the denoiser is not exact. Components are divided by their standard deviation to the power ``whiten``: as
    they come, the first three (the patch's mean colour) hold nearly all variance, and a denoiser does not learn edges.

    It has what ``StableDiffusionPipeline`` asks of a VAE (``config.scaling_factor``, ``config.block_out_channels`` with
    ``patch = 2 ** (len - 1)``), so that no pipeline needs to be changed.

    Args:
        patch_size: Pixels a side of a patch, a power of 2.
        in_channels: Colours.
        latent_channels: Components kept.
        scaling_factor: What pipelines multiply latents with.
        block_out_channels: Unused but for its length.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 4,
        in_channels: int = 3,
        latent_channels: int = 12,
        scaling_factor: float = 1.0,
        block_out_channels: tuple[int, ...] = (1, 1, 1),
        force_upcast: bool = False,
    ):
        super().__init__()
        want, values = 2 ** (len(block_out_channels) - 1), in_channels * patch_size**2
        if patch_size != want:
            computed = f"2 ** (len(block_out_channels) - 1) = {want}, as pipelines compute it"
            raise InputError(f"patch_size {patch_size} must be {computed}")
        if latent_channels > values:
            raise InputError(f"latent_channels {latent_channels} is more than the {values} values of a patch")
        self.mean = torch.nn.Parameter(torch.zeros(in_channels), requires_grad=False)
        basis = torch.eye(values)[:latent_channels]
        shape = (latent_channels, in_channels, patch_size, patch_size)
        self.basis = torch.nn.Parameter(basis.reshape(shape), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.ones(latent_channels), requires_grad=False)

    @classmethod
    def fit(
        cls, images: Tensor, latent_channels: int = 12, patch_size: int = 4, whiten: float = 1.0
    ) -> PatchAutoencoder:
        """The autoencoder of least squared error on ``images``.

        Args:
            images: ``(N, 3, H, W)`` in [-1, 1]; H and W multiples of ``patch_size``.
            latent_channels: Components kept.
            patch_size: Pixels a side of a patch.
            whiten: 0 leaves the components' variances as they are, 1 makes them equal.
        """
        _, c, h, w = images.shape
        if h % patch_size or w % patch_size:
            raise InputError(f"images of {h} x {w} cannot be cut into patches of {patch_size} x {patch_size} pixels")
        out = cls(patch_size, c, latent_channels, block_out_channels=(1,) * patch_size.bit_length())
        mean = images.mean((0, 2, 3))
        patches = F.unfold(images - mean.view(-1, 1, 1), patch_size, stride=patch_size)  # (N, c p p, cells)
        x = patches.transpose(1, 2).flatten(0, 1).double()
        value, vector = torch.linalg.eigh(x.T @ x / len(x))
        value, vector = value.flip(0)[:latent_channels], vector.flip(1)[:, :latent_channels].T
        vector = vector * vector.gather(1, vector.abs().argmax(1, keepdim=True)).sign()  # eigenvectors have no sign
        scale = value.clamp(min=1e-6).sqrt() ** whiten
        out.mean.copy_(mean)
        out.basis.copy_(vector.reshape(out.basis.shape))
        out.scale.copy_(scale)
        out.register_to_config(scaling_factor=float((value / scale**2).mean().rsqrt()))
        return out.eval()

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[PointPosterior]:
        """``latent_dist`` of images ``(B, 3, H, W)`` in [-1, 1]: ``(B, C, H / patch, W / patch)``, not yet scaled."""
        z = F.conv2d(x - self.mean.view(-1, 1, 1), self.basis, stride=self.config.patch_size)
        dist = PointPosterior(z / self.scale.view(-1, 1, 1))
        return AutoencoderKLOutput(latent_dist=dist) if return_dict else (dist,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Images ``(B, 3, h * patch, w * patch)``, about in [-1, 1], of latents ``(B, C, h, w)``.

        Latents are divided by the scaling factor already; ``generator`` is unused, but pipelines pass one.
        """
        x = F.conv_transpose2d(z * self.scale.view(-1, 1, 1), self.basis, stride=self.config.patch_size)
        x = x + self.mean.view(-1, 1, 1)
        return DecoderOutput(sample=x) if return_dict else (x,)

    def forward(self, x: Tensor) -> Tensor:
        """Encode and decode."""
        return self.decode(self.encode(x).latent_dist.mode()).sample


# The name that is in the folders of pipelines written before this module moved; diffusers imports none by itself.
sys.modules.setdefault("mmsae.backbones.patch_autoencoder", sys.modules[__name__])
