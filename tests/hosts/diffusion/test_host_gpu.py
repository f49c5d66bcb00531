"""A pipeline on CUDA: the same noise, the same sites."""

import pytest
import torch

from mmsae.hosts import DiffusionHost
from mmsae.hosts.sites import COND
from mmsae.types import ImageTextBatch
from tests.helpers.diffusion import MAKE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = ["a red circle", "large blue square on white background"]
UNET, TRANSFORMER = "unet.mid_block.attentions.0:update", "transformer.transformer_blocks.0:update"
SITE = {"sd": UNET, "sdxl": UNET, "sd3": TRANSFORMER, "flux": TRANSFORMER}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-2), (torch.float16, 0.15)])
def test_cuda_agrees_with_cpu(kind, dtype, tolerance):
    cpu, gpu = DiffusionHost(MAKE[kind]()), DiffusionHost(MAKE[kind]().to("cuda", dtype))
    assert gpu.device.type == "cuda" and gpu.site(SITE[kind]).width == cpu.site(SITE[kind]).width
    made = []
    for host in (cpu, gpu):
        edit = lambda rows, w: rows + (w.branch == COND)[:, None] * torch.linspace(-1, 1, rows.shape[1]).to(rows)  # noqa: E731
        text = "text_encoder_2.layers.1:out" if kind == "flux" else "text_encoder.layers.1:out"
        with host.edit(SITE[kind], edit, where=True), host.edit(text, edit, where=True, steps=(0, 1)):
            made.append(host.generate(PROMPTS, steps=2, seed=[1, 2], height=16, width=16))
    assert made[1].device.type == "cpu" and (made[0] - made[1]).abs().mean() < tolerance


def test_gradients_on_cuda_are_those_on_the_cpu():
    cpu, gpu = DiffusionHost(MAKE["sd"]()), DiffusionHost(MAKE["sd"]().to("cuda"))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = ImageTextBatch(images, cpu.tokenize(PROMPTS), PROMPTS, PROMPTS, PROMPTS, PROMPTS)
    for site in (UNET, "text_encoder.layers.1:out[content]"):
        a, b = (h.read(batch, [site], "diffusion")[0].grad.cpu().flatten() for h in (cpu, gpu))
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999
