import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmsae import SAE, InputError
from mmsae.interop import load
from mmsae.interop.saelens import write
from mmsae.sae import Normaliser
from tests.helpers.foreign import D, F, assert_equal_codes, rows, some_sae

IN_FOLDERS = (
    "relu", "topk", "abstopk", "jumprelu", "batch_topk", "batch_topk_norm", "feature_choice", "gated", "pursuit",
)  # fmt: skip
NORMALISERS = {
    "none": lambda: None,
    "rms": lambda: Normaliser(centre=True, scale="rms"),
    "unit": lambda: Normaliser(unit_in=True, centre=True),
    "standardise": lambda: Normaliser(standardise=True),
}


def theirs(folder):
    """What SAELens's own loader makes of a folder: codes and reconstructions of the rows."""
    saelens = pytest.importorskip("sae_lens")
    sae = saelens.SAE.load_from_disk(str(folder), device="cpu")
    with torch.no_grad():
        codes = sae.encode(rows())
        return codes, sae.decode(codes)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", IN_FOLDERS)
def test_saelens_loads_the_folder_that_mmsae_saves(kind, subtract, tmp_path):
    sae = some_sae(kind, subtract)
    folder = sae.save_pretrained(tmp_path / "sae")
    assert json.loads((folder / "cfg.json").read_text())["architecture"] != "mmsae"
    assert_equal_codes(sae, *theirs(folder))


@pytest.mark.parametrize("kind", IN_FOLDERS)
def test_mmsae_reads_its_folders_back_from_its_own_state(kind, tmp_path):
    sae = some_sae(kind)
    again = SAE.from_pretrained(sae.save_pretrained(tmp_path / "sae"))
    assert again.selector.name == sae.selector.name
    assert torch.equal(again.encode(rows()).to_dense(), sae.encode(rows()).to_dense())


@pytest.mark.parametrize("kind", IN_FOLDERS)
def test_the_top_of_such_a_folder_alone_is_the_same_sae(kind, tmp_path):
    sae = some_sae(kind)
    folder = sae.save_pretrained(tmp_path / "sae")
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["mmsae"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    again = load(folder)
    codes = again.encode(rows())
    assert_equal_codes(sae, codes.to_dense(), again.decode(codes))


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated", "relu"])
def test_normalisers_are_folded_into_what_is_written(kind, normaliser, tmp_path):
    sae = some_sae(kind, subtract=kind != "relu", normaliser=NORMALISERS[normaliser]())
    folder = write(sae, tmp_path / "sae")
    again = load(folder)
    codes = again.encode(rows())
    assert_equal_codes(sae, codes.to_dense(), again.decode(codes))
    assert_equal_codes(sae, *theirs(folder))


def test_one_modality_of_several_is_written(tmp_path):
    sae = some_sae("batch_topk", normaliser=Normaliser(centre=True), modalities=("image", "text"))
    again = load(write(sae, tmp_path / "text", "text"), modality="text")
    codes = again.encode(rows())
    assert again.modalities == ("text",)
    assert_equal_codes(sae, codes.to_dense(), again.decode(codes), "text")
    with pytest.raises(InputError, match="has modalities image, text, an SAE of SAELens has one"):
        write(sae, tmp_path / "both")


def test_what_saelens_cannot_express_is_another_architecture_or_refused(tmp_path):
    for sae, why in (
        (some_sae("groupmax"), "SAELens has no groupmax SAE"),
        (some_sae("pursuit_max"), "kind 'mp', sign 'relu', not 'mp', 'max'"),
        (some_sae("topk", normaliser=Normaliser(centre=True, unit_out=True)), "unit_out"),
    ):
        folder = sae.save_pretrained(tmp_path / "sae")
        assert json.loads((folder / "cfg.json").read_text())["architecture"] == "mmsae"
        with pytest.raises(InputError, match=why):
            write(sae, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_untrained_batch_topk_has_no_threshold_to_write(tmp_path):
    sae = some_sae("batch_topk")
    sae.selector.weight_.zero_()
    assert json.loads((sae.save_pretrained(tmp_path / "a") / "cfg.json").read_text())["architecture"] == "mmsae"
    with pytest.raises(InputError, match="SAELens cannot have this SAE: selector 'batch_topk' has seen no image rows"):
        write(sae, tmp_path / "b")


def edited(folder, tensors=None, **fields):
    """A SAELens folder with some fields of its configuration changed, and tensors added."""
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in (cfg | fields).items() if v is not ...}))
    if tensors:
        file = folder / "sae_weights.safetensors"
        save_file(load_file(file) | tensors, file)
    return folder


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architecture": "temporal"}, "has architecture 'temporal'; mmsae reads 'standard'"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations 'covariance_whitening'"),
        ({"normalize_activations": "expected_average_only_in"}, "give norm_scaling_factor"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ({"k": ...}, "does not say k"),
        ({"tensors": {"W_skip": torch.zeros(2)}}, r"tensors that mmsae does not know: \['W_skip'\]"),
        ({"tensors": {"scaling_factor": torch.full((F,), 2.0)}}, "scaling_factor that is not 1"),
        ({"d_sae": 7}, r"W_dec in .* has shape \(48, 12\), \(7, 12\) was expected"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change, why, tmp_path):
    folder = edited(write(some_sae("topk"), tmp_path / "sae"), **change)
    with pytest.raises(InputError, match=why):
        load(folder)


def test_jumprelu_without_thresholds_is_refused(tmp_path):
    folder = edited(write(some_sae("topk"), tmp_path / "sae"), architecture="jumprelu")
    with pytest.raises(InputError, match="has no tensor 'threshold'"):
        load(folder)


def test_a_factor_that_was_not_folded_is_given(tmp_path):
    sae = some_sae("topk")
    folder = edited(write(sae, tmp_path / "sae"), normalize_activations="expected_average_only_in")
    again = load(folder, norm_scaling_factor=0.5)
    codes = again.encode(rows() / 0.5)
    assert_equal_codes(sae, codes.to_dense(), again.decode(codes) * 0.5)


def test_selection_by_decoder_norms_is_folded_as_saelens_computes_it(tmp_path):
    folder = edited(write(some_sae("topk"), tmp_path / "sae"), rescale_acts_by_decoder_norm=True)
    t = load_file(folder / "sae_weights.safetensors")
    norms = t["W_dec"].norm(dim=1)
    u = ((rows() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
    top = u.topk(5)
    codes = torch.zeros(len(u), F).scatter(1, top.indices, top.values.relu())
    assert_equal_codes(load(folder), codes, (codes / norms) @ t["W_dec"] + t["b_dec"])
    assert_equal_codes(load(folder), *theirs(folder))


def test_configurations_of_before_version_6(tmp_path):
    sae = some_sae("topk")
    folder = write(sae, tmp_path / "sae")
    old = {
        "d_in": D,
        "d_sae": F,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "hook_point": "x",
        "dtype": "float32",
    }
    (folder / "cfg.json").write_text(json.dumps(old | {"normalize_activations": False, "apply_b_dec_to_input": False}))
    again = load(folder)
    codes = again.encode(rows())
    assert_equal_codes(some_sae("topk", subtract=False), codes.to_dense(), again.decode(codes))
    assert_equal_codes(again, *theirs(folder))
