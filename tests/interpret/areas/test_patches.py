import numpy as np
import pytest
import torch

from mmsae.errors import InputError
from mmsae.interpret.areas.areas import find_areas
from mmsae.interpret.areas.patches import AreaLatents, AreaOptions, PatchCodes, position_cosine, value_percentile
from mmsae.interpret.evidence.folder import EDGES, Evidence
from mmsae.types import Codes
from tests.helpers.areas import D, scene
from tests.helpers.evidence import write_evidence


def shifted(n=10):
    """Scenes in which latent 1 is anywhere, 2 is always at the top, 3 fires everywhere and 4 in one image only."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(n):
        z, _ = scene([(1, *rng.integers(3, 12, 2), 3, 3), (2, 0, 4, 2, 8)])
        z[..., 3] = 0.5
        if not i:
            z[8:12, 1:4, 4] = 1
        out.append(z)
    return np.stack(out)


def test_dense_and_position_only_latents_are_found(tmp_path):
    z = shifted()
    evidence = Evidence(write_evidence(tmp_path / "e", {"image": z.reshape(10, 256, D)}, grid={"image": (16, 16)}))
    latents = AreaLatents.of_evidence(evidence)
    assert latents.usable[[1, 4]].all() and not latents.usable[2] and not latents.usable[3]
    assert latents.idf[4] == pytest.approx(np.log(10)) and latents.idf[3] == 0
    tokens = evidence.tokens(0, "image")
    areas = find_areas(PatchCodes.of_tokens(tokens, evidence.grid("image"), D), latents)
    assert sorted(int(r.indices[0]) for r in areas.latents) == [1, 4]
    item, r, c, latent = np.nonzero(z)
    direct = AreaLatents.of_entries(item, latent, r * 16 + c, z[item, r, c, latent], (10, 256, D))
    assert (direct.usable == latents.usable).all() and np.allclose(direct.idf, latents.idf)
    assert direct.least[1] == 1 and direct.least[0] == 0 and (direct.least >= latents.least).all()


def test_position_cosine_is_the_mean_over_pairs_of_images():
    z = shifted()
    item, r, c, latent = np.nonzero(z)
    fast = position_cosine(item, latent, r * 16 + c, z[item, r, c, latent], 256, D)
    for j in (1, 2, 3):
        maps = z[..., j].reshape(10, -1)
        maps = maps / np.linalg.norm(maps, axis=1, keepdims=True)
        cos = maps @ maps.T
        assert fast[j] == pytest.approx((cos.sum() - 10) / 90, abs=1e-5)
    assert fast[4] == 0 and fast[0] == 0


def test_percentiles_are_lower_edges_of_bins(tmp_path):
    values = np.geomspace(0.1, 10, 100).astype(np.float32)
    z = np.zeros((100, 1, 2), np.float32)
    z[:, 0, 0] = values
    stats = Evidence(write_evidence(tmp_path / "e", {"image": z})).stats("image")
    edge = value_percentile(stats, 90)[0]
    assert edge in EDGES.astype(np.float32) and edge <= values[89] < edge * 10**0.13
    assert (value_percentile(stats, 0) == 0).all() and value_percentile(stats, 90)[1] == 0


def test_codes_tokens_and_dense_arrays_are_one():
    z, _ = scene([(1, 2, 2, 4, 4), (2, 3, 3, 6, 6)])
    flat = torch.from_numpy(z.reshape(256, D))
    top = flat.topk(3)
    for codes in (Codes(flat, None, D), Codes(top.values, top.indices, D)):
        a, b = find_areas(PatchCodes.of_codes(codes, 16, 16)), find_areas(PatchCodes.of_dense(z))
        assert (a.masks != b.masks).nnz == 0 and np.allclose(a.descriptor.toarray(), b.descriptor.toarray())
    with pytest.raises(InputError, match="256 rows of codes were given for a grid of 4 x 4 = 16"):
        PatchCodes.of_codes(Codes(flat, None, D), 4, 4)


def test_denoising_steps_are_apart(tmp_path):
    z = shifted(4).reshape(4, 256, D)
    folder = write_evidence(tmp_path / "e", {"image": z}, grid={"image": (16, 16)})
    evidence = Evidence(folder)
    tokens, grid = evidence.tokens(0, "image"), evidence.grid("image")
    later = tokens._replace(position=tokens.position + 256)
    assert len(PatchCodes.of_tokens(later, grid, D).value) == 0
    same = PatchCodes.of_tokens(later, grid, D, step=1)
    assert (same.position == PatchCodes.of_tokens(tokens, grid, D).position).all()


def test_options_say_what_is_a_lot():
    assert (AreaOptions().percentile, AreaOptions().least_patches, AreaOptions().merge) == (90, 3, 0.8)
