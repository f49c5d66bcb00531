import json

import pytest
import torch

from mmsae import InputError
from mmsae.interop import load
from mmsae.interop.sparsify import write
from mmsae.sae import Normaliser
from tests.helpers.foreign import D, assert_equal_codes, rows, some_sae


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", ["topk", "groupmax"])
def test_what_is_written_is_read_back_with_its_normaliser_folded(kind, subtract, tmp_path):
    sae = some_sae(kind, subtract, normaliser=Normaliser(centre=True, scale="rms"), d_sae=30)
    again = load(write(sae, tmp_path / "sae"))
    codes = again.encode(rows())
    assert_equal_codes(sae, codes.to_dense(), again.decode(codes))


@pytest.mark.parametrize("kind", ["topk", "groupmax"])
def test_sparsify_loads_it(kind, tmp_path):
    sparsify = pytest.importorskip("sparsify")
    sae = some_sae(kind, subtract=False)
    theirs = sparsify.SparseCoder.load_from_disk(write(sae, tmp_path / "sae"))
    with torch.no_grad():
        values, indices, _ = theirs.encode(rows())
        codes = torch.zeros(len(values), theirs.num_latents).scatter(1, indices, values)
        assert_equal_codes(sae, codes, codes @ theirs.W_dec + theirs.b_dec)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"transcode": True}, "has transcode True; mmsae reads False"),
        ({"skip_connection": True}, "has skip_connection True"),
        ({"signed": True}, "has signed True"),
        ({"activation": "jumprelu"}, "has activation 'jumprelu'; mmsae reads 'topk' or 'groupmax'"),
        ({"k": 0}, "k must be a whole number of at least 1, not 0"),
        ({"num_latents": 20}, "says 20 latents of width 12, encoder.weight is"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change, why, tmp_path):
    folder = write(some_sae("topk"), tmp_path / "sae")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(InputError, match=why):
        load(folder)


def test_without_a_number_of_latents_the_expansion_factor_counts(tmp_path):
    folder = write(some_sae("topk"), tmp_path / "sae")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"num_latents": 0, "expansion_factor": 4}))
    assert load(folder).d_sae == 4 * D


def test_what_sparsify_has_not_is_refused(tmp_path):
    with pytest.raises(InputError, match="sparsify has no jumprelu SAE; mmsae writes topk, groupmax for it"):
        write(some_sae("jumprelu"), tmp_path / "out")
