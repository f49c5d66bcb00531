"""Checkpoints of other libraries with those libraries' own codes and reconstructions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmsae import SAE
from mmsae.interop import LIBRARIES, load
from mmsae.interop.detect import module
from mmsae.sae.foreign import library_of

PARITY = Path(__file__).parents[2].parent / "shared" / "parity"
CASES = {
    "saelens_standard": {},
    "saelens_topk": {},
    "saelens_jumprelu": {},
    "saelens_gated": {},
    "saelens_abstopk": {},
    "saelens_standard_norm": {},
    "saelens_matching_pursuit": {},
    "dictlearn_standard": {},
    "dictlearn_gated": {},
    "dictlearn_jumprelu": {},
    "dictlearn_topk": {},
    "dictlearn_batchtopk": {},
    "overcomplete_topk": {"k": 8},
    "overcomplete_mp": {"k": 8},
    "overcomplete_jump": {},
    "sparsify_topk": {},
    "sparsify_groupmax": {},
    "visaebench_topk": {},
    "visaebench_batchtopk": {},
    "visaebench_jumprelu": {},
    "visaebench_overcomplete_keys": {},
    "saev_relu": {},
    "vlsae": {"k": 8},
}
WRITTEN_BY = {"dictlearn": "dictionary_learning"}

needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="the reference checkpoints are not on this machine")
every = pytest.mark.parametrize("name", CASES)


def expected(name):
    """``{modality: (x, codes, x_hat)}`` as the library itself has them."""
    io = load_file(PARITY / name / "io.safetensors")
    at = {"image": "vision.", "text": "text."} if name == "vlsae" else {"image": ""}
    return {m: tuple(io[a + n] for n in ("x", "codes", "x_hat")) for m, a in at.items()}


def assert_is_as_expected(sae, name):
    for modality, (x, codes, x_hat) in expected(name).items():
        found = sae.encode(x, modality)
        dense, again = found.to_dense(), sae.decode(found)
        assert torch.equal(dense != 0, codes != 0)
        torch.testing.assert_close(dense, codes, atol=1e-5, rtol=0)
        assert (again - x_hat).norm() / x_hat.norm() < 1e-5


@needs_parity
def test_every_reference_checkpoint_is_a_case():
    assert set(CASES) == {p.name for p in PARITY.iterdir() if p.is_dir()}


@needs_parity
@every
def test_codes_and_reconstructions_are_the_librarys_own(name):
    library = library_of(PARITY / name)
    assert library == WRITTEN_BY.get(name.split("_")[0], name.split("_")[0])
    assert [n for n in LIBRARIES if module(n).recognise(PARITY / name)] == [library]
    assert_is_as_expected(load(PARITY / name, **CASES[name]), name)


@needs_parity
@every
def test_so_are_those_of_the_folder_that_mmsae_saves(name, tmp_path):
    sae = load(PARITY / name, **CASES[name])
    assert_is_as_expected(SAE.from_pretrained(sae.save_pretrained(tmp_path / "sae")), name)


@needs_parity
@every
def test_what_is_written_back_for_the_library_is_read_back_equal(name, tmp_path):
    sae = load(PARITY / name, **CASES[name])
    library = library_of(PARITY / name)
    module(library).write(sae, tmp_path / "back")
    hints = {k: v for k, v in CASES[name].items() if library == "overcomplete"}
    assert_is_as_expected(load(tmp_path / "back", **hints), name)
