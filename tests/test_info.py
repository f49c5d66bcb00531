"""``mmsae info`` on every kind of path."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmsae import SAE, __version__
from mmsae.activations import write_store
from mmsae.cli import main
from mmsae.info import describe
from mmsae.sae import Dictionary, Normaliser, TopK
from mmsae.types import Site
from mmsae.world.generator.shards import write_world


def info(capsys, *args):
    main(["info", *map(str, args)])
    return capsys.readouterr().out


def fails(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["info", *map(str, args)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("mmsae: error: ") and said.count("\n") == 1
    return said


@pytest.fixture
def sae(tmp_path):
    model = SAE(8, 32, selector=TopK(4), normaliser=Normaliser(centre=True),
                dictionaries={m: Dictionary() for m in ("image", "text")})  # fmt: skip
    model.fit_normaliser({m: torch.randn(50, 8) for m in model.modalities})
    model.sites = {m: Site("a" * 32, f"{m}.embed", modality=m, width=8) for m in model.modalities}
    return model.save_pretrained(tmp_path / "sae", {"steps": 1234})


@pytest.fixture
def store(tmp_path):
    x = {m: torch.randn(30, 6) for m in ("image", "text")}
    return write_store(tmp_path / "store", x, captions=[f"item {i}" for i in range(30)])


def test_sae(sae, capsys):
    said = info(capsys, sae)
    parameters = 32 * 8 * 3 + 32 + 2 * 8
    for line in ("kind: SAE", "latents: 32", f"parameters: {parameters}", "  steps: 1,234", "  k: 4"):
        assert line in said.splitlines(), line
    assert "image.embed" in said and "aaaaaaaaaaaa" in said
    found = json.loads(info(capsys, sae, "--as-json"))
    assert found["selector"]["name"] == "topk" and found["widths"] == {"image": 8, "text": 8}


def test_run(sae, capsys):
    run = sae.parent
    found = json.loads(info(capsys, run, "--as-json"))
    assert found["kind"] == "run" and found["resume"] == "no" and found["sae"]["latents"] == 32
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").write_text("")
    assert "resume: --ckpt_path last" in info(capsys, run)


def test_store(store, capsys):
    found = json.loads(info(capsys, store, "--as-json", "true"))
    assert found["kind"] == "activation store" and found["items"] == 30
    assert found["sites"]["image"]["width"] == 6 and found["sites"]["text"]["rows"] == 30
    assert "items: 30" in info(capsys, store)
    assert "verified: content" in info(capsys, store, "--verify", "true")
    assert "verified: content" in info(capsys, store, "--verify")


def test_damaged_store(store, capsys):
    file = store / "shard-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "content hash" in fails(capsys, store, "--verify", "true")
    file.write_bytes(data[:-4])
    assert f"has {len(data) - 4} bytes" in fails(capsys, store)


def test_unfinished_store(store, capsys):
    (store / "spec.json").unlink()
    (store / "job.json").write_text('{"units": 4}')
    assert "unfinished, 1 of 4 shards are done" in fails(capsys, store)


@pytest.mark.parametrize("pattern", ["shards", "shards/*.tar", "shards/w-{000000..000001}.tar", "shards/w-000000.tar"])
def test_shards(pattern, tmp_path, capsys):
    write_world(tmp_path / "shards", 12, prefix="w", per_shard=6, progress=False)
    found = json.loads(info(capsys, tmp_path / pattern, "--as-json"))
    one = pattern.endswith("0.tar")
    assert found["kind"] == "shards" and found["samples"] == (6 if one else 12) and found["shards"] == (1 if one else 2)
    assert found["keys"] == dict.fromkeys(("png", "txt", "json"), found["samples"]) and len(found["captions"]) == 5
    assert found["image_sizes"] == [[32, 32]] and found["faults"]["dropped"] == 0


def test_host_folder(tmp_path, capsys):
    from tests.helpers.encoders import MODELS, save_local

    save_local(tmp_path / "host", MODELS["vit"])
    said = info(capsys, tmp_path / "host")
    assert "kind: host (open_clip folder)" in said and "image:image.embed.out[pooled] width 16" in said
    fingerprint = next(line.split()[1] for line in said.splitlines() if line.startswith("fingerprint"))
    assert len(fingerprint) == 32 and fingerprint[:12] in said.split("sites:")[1]


def test_nonsense(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no .tar shards" in fails(capsys, tmp_path / "empty")
    assert "No shard matches" in fails(capsys, tmp_path / "nothing" / "*.tar")
    (tmp_path / "page.txt").write_text("")
    assert "is not a shard" in fails(capsys, tmp_path / "page.txt")
    (tmp_path / "empty" / "cfg.json").write_text("{}")
    assert "another library" in fails(capsys, tmp_path / "empty")
    (tmp_path / "empty" / "cfg.json").write_text("{")
    assert "not valid JSON" in fails(capsys, tmp_path / "empty")


def test_results(tmp_path, capsys):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "job.json").write_text("{}")  # not to be taken for an unfinished store
    (tmp_path / "kept" / "results.json").write_text(json.dumps({"kept": 12, "dropped": 13, "scores": {"clip": 1}}))
    said = info(capsys, tmp_path / "kept")
    assert "kept: 12" in said and "also: scores" in said
    (tmp_path / "kept" / "results.json").write_text("[1]")
    assert "it holds a list, not an object" in fails(capsys, tmp_path / "kept")


def test_a_folder_of_timm(tmp_path, capsys):
    import timm
    from safetensors.torch import save_file

    folder = tmp_path / "tower"
    folder.mkdir()
    model = timm.create_model("test_vit", num_classes=0)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": {"num_classes": 0}})
    )
    said = info(capsys, folder)
    for line in ("kind: host (timm folder)", f"name: timm:local-dir:{folder}", "architecture: test_vit"):
        assert line in said.splitlines(), said
    assert "image.embed" in said and "fingerprint" in said
    state = {k: v for k, v in model.state_dict().items() if "norm" not in k}
    save_file(state, folder / "model.safetensors")
    assert "norm" in fails(capsys, folder)  # timm's own reason, whole


def test_a_folder_of_transformers(tmp_path, capsys):
    from tests.helpers import lvlm as lvlm_hosts

    lvlm_hosts.llava(tmp_path / "llava")
    said = info(capsys, tmp_path / "llava")
    assert "kind: host (transformers folder)" in said and f"name: lvlm:{tmp_path / 'llava'}" in said


def test_a_file_of_tensors(sae, tmp_path, capsys):
    file = Path(sae) / "sae_weights.safetensors"
    found = describe(file)
    assert found["metadata"] == {
        "format": "pt", "architecture": "mmsae", "d_in": '{"image": 8, "text": 8}', "d_sae": "32",
        "mmsae": __version__, "mmsae_format": "2",
    }  # fmt: skip
    assert found["tensors"]["W_enc"] == "F32 [8, 32]" and found["beside"].startswith("the SAE folder")
    assert found["numbers"] == sum(t.numel() for t in load_file(file).values())
    shutil.copy(file, tmp_path / "alone.safetensors")
    main(["info", str(tmp_path / "alone.safetensors")])
    out = capsys.readouterr().out
    assert "d_sae: 32" in out and "W_enc: F32 [8, 32]" in out and "beside: nothing that mmsae knows" in out
    (tmp_path / "alone.safetensors").write_bytes(file.read_bytes()[:50])
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path / "alone.safetensors")])
    assert "is damaged" in capsys.readouterr().err
