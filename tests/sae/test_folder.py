"""save -> load -> encode is equal for every composition; bad files are refused in one sentence."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmsae import SAE, InputError, Site, Tokens
from mmsae.sae import AffineEncoder, Dictionary, DistanceEncoder, Normaliser, PerModalityEncoder, TopK, random_control
from mmsae.sae.aligner import Aligner


def per_modality(norm="unit"):
    return {m: Dictionary(norm=norm) for m in ("image", "text")}


FILES = ["README.md", "cfg.json", "mmsae_state.safetensors", "sae_weights.safetensors"]
ROWS = Normaliser(unit_in=True, centre=True, unit_out=True)
COMPOSITIONS = {
    "paired_topk": lambda: {"d_in": 8, "normaliser": copy.deepcopy(ROWS), "dictionaries": per_modality()},
    "vl_sae": lambda: {
        "d_in": 8, "encoder": DistanceEncoder(), "selector": TopK(3, strict=True), "dictionaries": per_modality("free"),
    },
    "shared": lambda: {"d_in": 8, "normaliser": Normaliser(centre=True, scale="rms")},
    "dual": lambda: {
        "d_in": {"image": 8, "text": 5}, "encoder": PerModalityEncoder(AffineEncoder()), "dictionaries": per_modality(),
    },
    "topk": lambda: {"d_in": 8, "modalities": ["image"]},
    "no_bias": lambda: {
        "d_in": 8, "modalities": ["image"], "encoder": AffineEncoder(bias=False),
        "dictionaries": {"shared": Dictionary(bias=False)},
    },
}  # fmt: skip


def make(name, seed=0):
    torch.manual_seed(seed)
    sae = SAE(**({"d_sae": 32, "selector": TopK(3)} | COMPOSITIONS[name]()))
    x = {m: torch.randn(20, d) + 1 for m, d in sae.d_in.items()}
    sae.fit_normaliser(x)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return sae, x


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_round_trip(tmp_path, name):
    sae, x = make(name)
    sae.selector.set_k(4)  # an annealed k is part of the state
    state = torch.get_rng_state()
    again = SAE.from_pretrained(sae.save_pretrained(tmp_path / "sae"))
    assert torch.equal(torch.get_rng_state(), state)  # loading draws nothing
    for m, v in x.items():
        a, b = sae.encode(v, m), again.encode(v.numpy(), m)
        assert torch.equal(a.to_dense(), b.to_dense()) and (a.l0() <= 4).all() and a.indices.shape[1] == 4
        assert torch.equal(sae.decode(a), again.decode(b, m))


def test_names_and_layout_in_the_file(tmp_path):
    sae, _ = make("paired_topk")
    tensors = load_file(sae.save_pretrained(tmp_path / "sae") / "sae_weights.safetensors")
    assert tensors["W_enc"].shape == (8, 32) and tensors["W_dec.image"].shape == (32, 8)
    assert torch.equal(tensors["W_enc"].t(), sae.encoder.weight)
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["architecture"] == "mmsae"
    assert "sparse-autoencoder" in (tmp_path / "sae" / "README.md").read_text()


def test_one_modality_topk_is_a_saelens_folder(tmp_path):
    sae, x = make("topk")
    sae.save_pretrained(tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    want = {
        "architecture": "topk",
        "k": 3,
        "d_in": 8,
        "d_sae": 32,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
    }
    assert {k: cfg[k] for k in want} == want
    t = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert set(t) == {"W_enc", "b_enc", "W_dec", "b_dec"}  # SAELens refuses tensors that it does not know
    state = load_file(tmp_path / "sae" / "mmsae_state.safetensors")
    statistics = {f"normaliser.{name}_image" for name in ("mean", "factor", "variance")}
    assert set(state) == {*statistics, "selector.k_"}
    u = (x["image"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]  # SAELens's formula
    top = u.relu().topk(3)
    z = torch.zeros_like(u).scatter(1, top.indices, top.values)
    codes = sae.encode(x["image"])
    torch.testing.assert_close(codes.to_dense(), z)
    torch.testing.assert_close(sae.decode(codes), z @ t["W_dec"] + t["b_dec"])


def test_saelens_itself_loads_the_folder_and_computes_the_same(tmp_path):
    saelens = pytest.importorskip("sae_lens")
    sae, x = make("topk")
    theirs = saelens.SAE.load_from_disk(str(sae.save_pretrained(tmp_path / "sae")), device="cpu")
    codes = sae.encode(x["image"])
    with torch.no_grad():
        z = theirs.encode(x["image"])
        z = z.to_dense() if z.is_sparse else z
        torch.testing.assert_close(z, codes.to_dense(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.decode(z), sae.decode(codes), rtol=1e-5, atol=1e-5)


def test_a_folder_with_everything_in_one_file_still_loads(tmp_path):
    """Format 1, which had the buffers among the weights."""
    sae, x = make("paired_topk")
    folder = sae.save_pretrained(tmp_path / "sae")
    state = load_file(folder / "mmsae_state.safetensors")
    with pytest.raises(InputError, match=r"no mmsae_state\.safetensors"):
        (folder / "mmsae_state.safetensors").unlink()
        SAE.from_pretrained(folder)
    save_file(load_file(folder / "sae_weights.safetensors") | state, folder / "sae_weights.safetensors")
    edit_cfg(folder, lambda c: c["mmsae"].update(format=1))
    again = SAE.from_pretrained(folder)
    for m, v in x.items():
        assert torch.equal(again.encode(v, m).to_dense(), sae.encode(v, m).to_dense())


def test_saving_needs_no_installed_package(tmp_path):
    code = (
        "import importlib.metadata as m, sys\n"
        "def gone(name): raise m.PackageNotFoundError(name)\n"
        "m.version = gone\n"
        "from mmsae import SAE\n"
        "SAE(8, 64).save_pretrained(sys.argv[1])"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "sae")], check=True, env=env)
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["mmsae"]["version"] == "0.0.0"


def edit_cfg(folder, fn):
    path = folder / "cfg.json"
    cfg = json.loads(path.read_text())
    fn(cfg)
    path.write_text(json.dumps(cfg))


def test_bad_folders_are_refused(tmp_path):
    folder = make("topk")[0].save_pretrained(tmp_path / "sae")
    with pytest.raises(InputError, match="no SAE at"):
        SAE.from_pretrained(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no cfg\.json"):
        SAE.from_pretrained(tmp_path)
    edit_cfg(folder, lambda c: c["mmsae"]["selector"].update(name="os.system"))
    with pytest.raises(InputError, match=r"unknown selector 'os\.system'"):
        SAE.from_pretrained(folder)
    edit_cfg(folder, lambda c: (c["mmsae"]["selector"].update(name="topk"), c["mmsae"].update(d_in={"image": 9})))
    with pytest.raises(InputError, match=r"shape \(8, 32\).*says \(9, 32\)"):
        SAE.from_pretrained(folder)
    edit_cfg(folder, lambda c: c["mmsae"].update(format=99))
    with pytest.raises(InputError, match=r"format 99.*reads up to 2"):
        SAE.from_pretrained(folder)
    edit_cfg(folder, lambda c: c.pop("mmsae"))
    with pytest.raises(InputError, match="written by another library"):
        SAE.from_pretrained(folder)


def test_damaged_folders_are_refused_in_one_sentence(tmp_path):
    folder = make("topk")[0].save_pretrained(tmp_path / "sae")
    weights, cfg = folder / "sae_weights.safetensors", folder / "cfg.json"
    whole, text = weights.read_bytes(), cfg.read_text()
    for n in (0, 100, len(whole) - 1):
        weights.write_bytes(whole[:n])
        with pytest.raises(InputError, match=r"sae_weights\.safetensors is damaged"):
            SAE.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(InputError, match="weights are missing"):
        SAE.from_pretrained(folder)
    for edit in (
        lambda c: c["mmsae"].pop("format"),
        lambda c: c["mmsae"]["encoder"].update(colour="red"),
        lambda c: c["mmsae"].update(selector="topk"),
        lambda c: c["mmsae"].update(dictionaries={"shared": 3}),
        lambda c: c["mmsae"].update(sites={"image": {"where": "there"}}),
        lambda c: c["mmsae"].update(d_sae="many"),
        lambda c: c.update(mmsae=[]),
    ):
        cfg.write_text(text)
        edit_cfg(folder, edit)
        with pytest.raises(InputError, match=r"cfg\.json is not what mmsae writes"):
            SAE.from_pretrained(folder)
    cfg.write_text("[]")
    with pytest.raises(InputError, match="written by another library"):
        SAE.from_pretrained(folder)
    with pytest.raises(InputError, match="no SAE at"):
        SAE.from_pretrained("me/no such name")


@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError])
def test_a_fault_of_ours_is_no_fault_of_the_folder(tmp_path, monkeypatch, error):
    def broken(*_, **__):
        raise error("ours")

    folder = make("topk")[0].save_pretrained(tmp_path / "sae")
    monkeypatch.setattr(SAE, "build", broken)
    with pytest.raises(error, match="ours"):
        SAE.from_pretrained(folder)


def test_files_of_a_saved_folder_may_be_read_by_those_who_may_read_the_folder(tmp_path):
    before = os.umask(0o027)
    try:
        folder = make("topk")[0].save_pretrained(tmp_path / "sae")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o640}


def test_saving_replaces_a_folder_as_a_whole_and_leaves_nothing_beside_it(tmp_path):
    sae, _ = make("topk")
    sae.save_pretrained(tmp_path / "sae")
    (tmp_path / "sae" / "stale").write_text("")
    sae.save_pretrained(tmp_path / "sae")
    assert [p.name for p in tmp_path.iterdir()] == ["sae"] and not (tmp_path / "sae" / "stale").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    sae, _ = make("topk")
    (tmp_path / "thesis.txt").write_text("mine")
    aligner = Aligner({"image": 8, "text": 8}, 4)
    for what in (sae, aligner):
        for out in (tmp_path, tmp_path / "thesis.txt"):
            with pytest.raises(InputError, match="holds other things and no"):
                what.save_pretrained(out)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert SAE.from_pretrained(sae.save_pretrained(tmp_path / "empty")).d_sae == sae.d_sae


def test_a_failed_save_keeps_the_old_folder(tmp_path, monkeypatch):
    sae, x = make("topk")
    sae.save_pretrained(tmp_path / "sae")
    before = sae.encode(x["image"]).to_dense()

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmsae.sae.tensor_file.write", full)
    with pytest.raises(OSError, match="No space"):
        sae.save_pretrained(tmp_path / "sae")
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]
    assert torch.equal(SAE.from_pretrained(tmp_path / "sae").encode(x["image"]).to_dense(), before)


def test_wrong_width_and_modality_are_named():
    sae, _ = make("paired_topk")
    with pytest.raises(InputError, match=r"shape \(3, 9\).*takes \(N, 8\)"):
        sae.encode(np.zeros((3, 9), np.float32), "image")
    with pytest.raises(InputError, match="modality must be one of"):
        sae.encode(torch.zeros(3, 8))
    with pytest.raises(InputError, match="not both"):
        SAE(8, 32, ratio=4)
    with pytest.raises(InputError, match="d_sae or ratio"):
        SAE(8)
    with pytest.raises(InputError, match="dictionaries must be"):
        SAE(8, 32, dictionaries={"image": Dictionary()})


def test_numpy_views_that_torch_cannot_share(recwarn):
    sae, x = make("paired_topk")
    reverse, frozen = x["image"].numpy()[::-1], x["image"].numpy().copy()
    frozen.flags.writeable = False
    want = sae.encode(x["image"], "image").to_dense()
    assert torch.equal(sae.encode(reverse, "image").to_dense(), want.flip(0))
    assert torch.equal(sae.encode(frozen, "image").to_dense(), want) and not recwarn.list


def test_a_one_modality_sae_takes_its_side_of_a_paired_batch():
    sae, x = make("topk")
    batch = Tokens.pooled({"image": x["image"], "text": torch.zeros(len(x["image"]), 5)})
    out = sae(batch)
    assert list(out) == ["image"] and torch.equal(out["image"].x_hat, sae(x)["image"].x_hat)
    assert SAE(d_sae=32, modalities=["image"]).build({"text": 5, "image": 8}).d_in == {"image": 8}
    with pytest.raises(InputError, match="not 'text'"):  # a mapping was made for this SAE: nothing is passed over
        sae(batch.x)
    with pytest.raises(InputError, match="not 'text'"):
        sae(Tokens.pooled({"text": batch.x["text"]}))
    with pytest.raises(InputError, match="also has text"):
        SAE(d_sae=32).build({"image": 8})


def test_the_random_control_has_the_same_parts_and_fresh_weights():
    sae, x = make("dual")
    sae.double()
    state = torch.get_rng_state()
    control = random_control(sae, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in control.parameters()} == {torch.float64}
    assert torch.equal(control.normaliser.variance("text"), sae.normaliser.variance("text"))
    weight = control.dictionaries["image"].weight
    assert not torch.allclose(weight, sae.dictionaries["image"].weight)
    assert torch.equal(weight, random_control(sae, seed=3).dictionaries["image"].weight)
    assert control.encode(x["image"], "image").values.dtype == torch.float64


class Host:
    def __init__(self, fingerprint, width=8):
        self.fingerprint, self.width = fingerprint, width

    def default_sites(self):
        return {m: Site(self.fingerprint, f"{m}.embed", modality=m, width=self.width) for m in ("image", "text")}


def test_attach_names_sites_once_and_then_refuses_others(tmp_path):
    sae, _ = make("paired_topk")
    sites = sae.attach(Host("a" * 32))
    assert [s.module for s in sites] == ["image.embed", "text.embed"]
    again = SAE.from_pretrained(sae.save_pretrained(tmp_path / "sae"))
    assert again.sites == sae.sites
    with pytest.raises(InputError, match=r"trained on .*host aaaaaaaaaaaa, not on host bbbbbbbbbbbb"):
        again.attach(Host("b" * 32))
    assert again.attach(Host("b" * 32), allow_other_site=True)[0].host == "a" * 32
    with pytest.raises(InputError, match="width 8 for image"):
        make("paired_topk")[0].attach(Host("c" * 32, width=9))
