from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmsae import SAE, InputError
from mmsae.interop import convert, load
from mmsae.interop.vlsae import k_and_ratio

PARITY = Path(__file__).parents[2].parent / "shared" / "parity" / "vlsae"


def published(kind, d=6, h=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    if kind == "vl_sae":
        return {
            "encoder": r(h, d),
            **{f"{m}_decoder.{n}": r(*s) for m in ("vision", "text") for n, s in (("weight", (d, h)), ("bias", (d,)))},
        }
    if kind == "dual":
        enc = {f"{m}_encoder.{n}": r(*s) for m in "vt" for n, s in (("weight", (h, d)), ("bias", (h,)))}
        dec = {f"{m}_decoder.0.{n}": r(*s) for m in ("vision", "text") for n, s in (("weight", (d, h)), ("bias", (d,)))}
        return enc | dec
    return {"encoder.weight": r(h, d), "encoder.bias": r(h), "decoder.0.weight": r(d, h), "decoder.0.bias": r(d)}


@pytest.mark.skipif(not PARITY.is_dir(), reason="the reference checkpoints are not on this machine")
@pytest.mark.parametrize("strict", [False, True])
def test_published_checkpoint_gives_the_reference_codes(strict):
    io = load_file(PARITY / "io.safetensors")
    sae = load(PARITY / "vl_sae_k8.pth", k=int(io["k"]), strict=strict)
    for modality, name in (("image", "vision"), ("text", "text")):
        codes = sae.encode(io[f"{name}.x"], modality)
        dense = codes.to_dense()
        assert torch.equal(dense != 0, io[f"{name}.codes"] != 0)
        torch.testing.assert_close(dense, io[f"{name}.codes"], atol=1e-5, rtol=0)
        x_hat, want = sae.decode(codes), io[f"{name}.x_hat"]
        assert ((x_hat - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["vl_sae", "dual", "shared"])
def test_layouts_by_the_naive_formula(tmp_path, kind):
    state = published(kind)
    path = tmp_path / f"x_{kind}_3_2_best.pth"
    torch.save(state, path)
    sae = load(path)
    x = torch.randn(5, 6)
    for modality, v in (("image", "vision"), ("text", "text")):
        if kind == "vl_sae":
            w = state["encoder"]
            a = 2 - torch.cdist(x / x.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True))
            dec = f"{v}_decoder"
        else:
            enc = "encoder" if kind == "shared" else f"{v[0]}_encoder"
            a = (x @ state[enc + ".weight"].t() + state[enc + ".bias"]).relu()
            dec = "decoder.0" if kind == "shared" else f"{v}_decoder.0"
        top = a.topk(3).indices
        h = torch.zeros_like(a).scatter(1, top, a.gather(1, top))
        codes = sae.encode(x, modality)
        torch.testing.assert_close(codes.to_dense(), h, atol=1e-5, rtol=0)
        want = h @ state[dec + ".weight"].t() + state[dec + ".bias"]
        torch.testing.assert_close(sae.decode(codes), want, atol=1e-5, rtol=1e-5)


def test_k_from_the_name_or_required(tmp_path):
    assert k_and_ratio("openclip_ViT-B-32_VL_SAE_256_8_best.pth") == (256, 8)
    torch.save(published("vl_sae"), tmp_path / "plain.pth")
    with pytest.raises(InputError, match="does not say k"):
        load(tmp_path / "plain.pth")
    torch.save(published("vl_sae"), tmp_path / "x_3_8_best.pth")
    with pytest.raises(InputError, match="says ratio 8 of width 6, the file has 12"):
        load(tmp_path / "x_3_8_best.pth")


def test_an_aligner_and_a_pickle_are_refused(tmp_path):
    torch.save(
        {"vision_projection.weight": torch.zeros(2, 2), "vision_decoder.weight": torch.zeros(2, 2)}, tmp_path / "a.pt"
    )
    with pytest.raises(InputError, match="aligner"):
        load(tmp_path / "a.pt", k=1)
    torch.save({"encoder": pytest.raises}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "evil.pth", k=1)
    with pytest.raises(InputError, match="no checkpoint file"):
        load(tmp_path / "none.pth")


def test_convert_writes_a_folder_that_encodes_equally(tmp_path):
    path = tmp_path / "x_3_2_best.pth"
    torch.save(published("vl_sae"), path)
    sae, again = load(path), SAE.from_pretrained(convert(str(path), str(tmp_path / "sae")))
    x = torch.randn(7, 6)
    assert torch.equal(sae.encode(x, "text").to_dense(), again.encode(x, "text").to_dense())
    assert torch.equal(sae.decode(sae.encode(x, "image"), "text"), again.decode(again.encode(x, "image"), "text"))


@pytest.mark.parametrize(("d", "params"), [(512, 6_292_480), (768, 14_157_312), (1024, 25_167_872)])
def test_parameter_counts_of_the_published_sizes(d, params):
    from mmsae.sae import Dictionary, DistanceEncoder, TopK

    dictionaries = {m: Dictionary(norm="free") for m in ("image", "text")}
    sae = SAE(d, ratio=8, encoder=DistanceEncoder(), selector=TopK(256), dictionaries=dictionaries)
    assert sum(p.numel() for p in sae.parameters()) == params


def test_converting_onto_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    torch.save(published("shared"), tmp_path / "x_shared_3_2_best.pth")

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmsae.sae.tensor_file.write", full)
    with pytest.raises(InputError, match="out: no space left"):
        convert(str(tmp_path / "x_shared_3_2_best.pth"), str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["x_shared_3_2_best.pth"]


def test_what_is_written_is_read_back_and_other_saes_are_refused(tmp_path):
    from mmsae.interop.vlsae import write
    from mmsae.sae import Dictionary, DistanceEncoder, Normaliser, TopK

    torch.save(published("vl_sae"), tmp_path / "x_3_2_best.pth")
    sae = load(tmp_path / "x_3_2_best.pth")
    again, x = load(write(sae, tmp_path / "out")), torch.randn(7, 6)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["vl_sae_3_2_best.pth"]
    for m in ("image", "text"):
        assert torch.equal(again.encode(x, m).to_dense(), sae.encode(x, m).to_dense())
        assert torch.equal(again.decode(again.encode(x, m)), sae.decode(sae.encode(x, m)))
    with pytest.raises(InputError, match="encoder 'affine', not 'distance': it is no VL-SAE"):
        write(SAE(6, 12, selector=TopK(3)), tmp_path / "other")
    parts = {"encoder": DistanceEncoder(), "selector": TopK(3), "normaliser": Normaliser(centre=True)}
    with pytest.raises(InputError, match="no normaliser"):
        write(SAE(6, 12, dictionaries={m: Dictionary() for m in ("image", "text")}, **parts), tmp_path / "other")
