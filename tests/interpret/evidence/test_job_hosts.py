"""Evidence on the kinds of encoders: transformers and timm, tokens and maps, class tokens that are no evidence."""

import numpy as np
import pytest
import timm
import torch

from mmsae.hosts import load_host
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.evidence.job import collect_evidence
from mmsae.interpret.evidence.options import Evidencing
from mmsae.options import SAERun
from mmsae.sae import SAE, TopK
from mmsae.shards import ShardWriter, expand, unit_batches
from tests.helpers.evaluation import png
from tests.helpers.transformers import save

RUN = SAERun(device="cpu", workers=0, batch_size=8, progress=False)
CHOICE = Evidencing(n_top=3, quantiles=2, each=2, negatives=4, min_items=2)


def of_timm(name):
    def made(folder):
        torch.manual_seed(0)
        timm.models.save_for_hf(timm.create_model(name), folder, safe_serialization=True)
        return f"timm:local-dir:{folder}"

    return made


HOSTS = {
    "clip": (lambda f: save(f, "clip"), "vision_model.encoder.layers.1:out[patches]", (4, 4), "center"),
    "dinov2": (lambda f: save(f, "dinov2"), "encoder.layer.1:out[all]", (4, 4), "whole"),
    "convnext": (lambda f: save(f, "convnext"), "encoder.stages.0:out", (8, 8), "whole"),
    "timm_vit": (of_timm("test_vit"), "blocks.1:out[patches]", (10, 10), "center"),
    "timm_resnet": (of_timm("test_resnet"), "layer2:out", None, "center"),
    "cls": (lambda f: save(f, "vit"), "layers.1:out[cls]", (0, 0), "whole"),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_places_are_the_grid_of_the_hosts_view(kind, tmp_path):
    make, spec, cells, view = HOSTS[kind]
    host = load_host(make(tmp_path / "host"))
    site = host.site(spec)
    torch.manual_seed(0)
    sae = SAE({"image": site.width}, 24, modalities=("image",), selector=TopK(4)).eval()
    sae.sites = {"image": site}
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "shards", "s") as w:
        for i in range(14):
            w.write(f"k{i:02d}", {"png": png(rng.integers(0, 256, (40, 80, 3), dtype=np.uint8))})
    data = str(tmp_path / "shards")
    collect_evidence(sae, data, tmp_path / "out", host, CHOICE, RUN)
    e = Evidence(tmp_path / "out")
    grid = e.grid("image")
    size = host.probe_input("image", 1).shape[-1]
    cells = cells or (size // 8, size // 8)
    assert (grid.rows, grid.cols) == cells and grid.places == max(1, cells[0] * cells[1])
    left, top, right, bottom = e.items.view[int(e.top("image").item.max())]
    expected = (0, 0, 1, 1) if view == "whole" else (0.25, 0, 0.75, 1)
    assert np.allclose((left, top, right, bottom), expected, atol=0.07)
    reading = host.reading({"image"})
    batch = next(unit_batches(expand(data), reading["transform"], None, 8)).batch
    rows = host.read(batch, [site])[0]
    keep = torch.ones(len(rows.x), dtype=torch.bool) if rows.special is None or kind == "cls" else ~rows.special
    with torch.no_grad():
        z = sae.encode(rows.x[keep], "image").to_dense().view(8, grid.places, -1).numpy()
    for i in range(8):
        latents, values = e.codes("image").row(i)
        at = np.abs(z[i]).argmax(0)
        assert latents.tolist() == np.flatnonzero(z[i].any(0)).tolist()
        np.testing.assert_allclose(values, z[i][at, np.arange(24)][latents], rtol=1e-4)
        if grid.rows and e.tokens(i, "image") is not None:
            np.testing.assert_allclose(e.heat(i, latents[0]).ravel(), z[i][:, latents[0]], rtol=1e-4, atol=1e-6)
