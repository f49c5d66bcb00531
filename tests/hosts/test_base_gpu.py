"""The same host on CUDA."""

import pytest
import torch

from mmsae.hosts import load_host
from tests.helpers.encoders import MODELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("precision,tolerance", [("fp32", 1e-2), ("bf16", 0.1), ("fp16", 0.05)])
def test_cuda_agrees_with_cpu(host, batch_for, kind, precision, tolerance):
    cpu = host(kind)
    gpu = load_host(cpu.hint, "cuda", precision)
    assert gpu.fingerprint == cpu.fingerprint and gpu.device.type == "cuda"
    batch = batch_for(cpu)
    blocks = [n for n, m in cpu.model.named_modules() if type(m).__name__ == "ResidualAttentionBlock"][:1]
    for site in (*cpu.endpoints, *blocks):
        a, b = cpu.read(batch, [site])[0], gpu.read(batch, [site])[0]
        assert b.x.is_cuda and b.x.dtype == torch.float32 and torch.equal(a.item, b.item.cpu())
        assert (a.x - b.x.cpu()).norm() < tolerance * a.x.norm(), site
    with gpu.edit("image.pooled", lambda x: x.clone()), gpu.edit("text.embed", lambda x: x * 2):
        edited = gpu.capture(batch)
    plain = gpu.capture(batch)
    torch.testing.assert_close(edited.x["text"], plain.x["text"] * 2)
    torch.testing.assert_close(edited.x["image"], plain.x["image"], atol=tolerance, rtol=tolerance)
