"""Evidence of a denoiser and of a text encoder of text-to-image pipelines, against what the host streams."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmsae.hosts import DiffusionHost
from mmsae.interpret.evidence.drawn import seed_of, steps_read
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.evidence.job import collect_evidence
from mmsae.interpret.evidence.options import Evidencing
from mmsae.options import Drawing, SAERun
from mmsae.sae import SAE, TopK
from mmsae.shards import ShardWriter
from mmsae.types import InputError
from tests.helpers.diffusion import MAKE, WORDS

RUN = SAERun(device="cpu", workers=0, batch_size=4, progress=False)
CHOICE = Evidencing(n_top=4, quantiles=2, each=2, negatives=4, min_items=3, at_steps=3, seed=5)
DRAWING = Drawing(steps=5, guidance=2.0)
SITES = {"sd": "unet.up_blocks.0.attentions.0:update", "sd3": "transformer.transformer_blocks.1:out"}


def texts(n):
    return [f"a {WORDS[4 + i % 3]} {WORDS[7 + i // 3 % 2]} on {WORDS[9 + i % 2]} background" for i in range(n)]


def sae_at(host, spec, modality="image"):
    torch.manual_seed(0)
    site = host.site(spec)
    sae = SAE({modality: site.width}, 40, modalities=(modality,), selector=TopK(5)).eval()
    sae.fit_normaliser({modality: torch.randn(64, site.width)})
    sae.sites = {modality: site}
    return sae


@pytest.fixture(scope="module", params=list(SITES))
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    host = DiffusionHost(MAKE[request.param]())
    sae = sae_at(host, SITES[request.param])
    with ShardWriter(root / "shards", "p", per_shard=7) as w:
        for i, text in enumerate(texts(12)):
            w.write(f"p{i:02d}", {"txt": text, "json": {"class": text.split()[1]}})
    about = collect_evidence(sae, str(root / "shards"), root / "out", host, CHOICE, RUN, drawing=DRAWING)
    return host, sae, root, about, Evidence(root / "out")


def test_maps_are_those_that_the_host_streams_step_by_step(made):
    host, sae, _, about, e = made
    assert e.modalities == ["image"] and about["images"] and e.grid("image").steps == (0, 2, 4)
    grid, site = e.grid("image"), sae.sites["image"]
    assert grid.rows * grid.cols == grid.places
    for i in (0, 5, 11):
        seed = seed_of(e.items.uid[i], 5)
        (tokens,) = host.stream([e.items.caption[i]], site, steps=5, sample_steps=[0, 2, 4], guidance=2.0, seed=[seed])
        with torch.no_grad():
            z = sae.encode(tokens.x["image"], "image").to_dense().view(3, grid.places, -1).numpy()
        latents, values = e.codes("image").row(i)
        flat = z.reshape(-1, sae.d_sae)
        at = np.abs(flat).argmax(0)
        assert latents.tolist() == np.flatnonzero(flat.any(0)).tolist()
        np.testing.assert_allclose(values, flat[at, np.arange(sae.d_sae)][latents], rtol=2e-3, atol=1e-4)
        if e.tokens(i, "image") is None:
            continue
        for j in latents[:5]:
            for step in range(3):
                np.testing.assert_allclose(e.heat(i, j, step=step).ravel(), z[step, :, j], rtol=2e-3, atol=1e-4)


def test_thumbnails_are_what_is_drawn_with_the_same_noise(made):
    host, _, _, _, e = made
    item = int(e.top("image").item.max())
    seed = seed_of(e.items.uid[item], 5)
    image = host.generate([e.items.caption[item]], steps=5, guidance=2.0, seed=[seed])[0]
    shown = np.asarray(Image.open(io.BytesIO(e.thumbnail(item))).convert("RGB"))
    own = (image.clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert shown.shape == own.shape and np.abs(shown - own).mean() < 25  # WebP of noise
    assert e.items.label[0] == texts(1)[0].split()[1] and (e.items.view == [0, 0, 1, 1]).all()


def test_a_file_of_prompts_does_as_well(made, tmp_path):
    host, sae, *_ = made
    (tmp_path / "prompts.txt").write_text("\n".join(texts(6)))
    choice = Evidencing(**vars(CHOICE) | {"keep_gb": 0.0})
    collect_evidence(sae, str(tmp_path / "prompts.txt"), tmp_path / "out", host, choice, RUN, drawing=DRAWING)
    e = Evidence(tmp_path / "out")
    assert e.items.caption == texts(6) and e.items.shard == ["prompts.txt"] * 6 and e.about["faults"]["seen"] == 6
    with pytest.raises(InputError, match="steps is 5 there and 6 here"):
        other = Drawing(steps=6, guidance=2.0)
        collect_evidence(sae, str(tmp_path / "prompts.txt"), tmp_path / "out", host, choice, RUN, drawing=other)
    with pytest.raises(InputError, match="cannot be read together"):
        collect_evidence(sae, [str(tmp_path / "prompts.txt"), "x.tar"], tmp_path / "o", host, choice, RUN)


def test_a_text_encoder_reads_captions_with_their_words(tmp_path):
    host = DiffusionHost(MAKE["sd"]())
    sae = sae_at(host, "text_encoder.layers.1:out[content]", "text")
    (tmp_path / "prompts.txt").write_text("\n".join(texts(12)))
    about = collect_evidence(sae, str(tmp_path / "prompts.txt"), tmp_path / "out", host, CHOICE, RUN)
    e = Evidence(tmp_path / "out")
    assert e.modalities == ["text"] and not about["images"]
    words = {i: w for i in range(e.n) if (w := e.words(i)) is not None}
    assert len(words) > 5 and all("".join(w.text).strip() == e.items.caption[i] for i, w in words.items())
    assert all(w.position[0] == 1 for w in words.values())


def test_steps_are_spread_over_the_schedule():
    assert steps_read(Drawing(steps=20), 4) == (0, 6, 13, 19)
    assert steps_read(Drawing(steps=1), 4) == (0,) and steps_read(Drawing(steps=3), 9) == (0, 1, 2)
