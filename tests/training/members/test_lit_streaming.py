"""Members of a run on a stream: the host runs once for all, and each is what a run of its own would give."""

import io
import json

import pytest
import yaml
from PIL import Image

from mmsae import SAE
from mmsae.cli import main
from mmsae.hosts.base import Host
from mmsae.recipes import read_recipe
from mmsae.shards import ShardWriter
from mmsae.training.members import LitSAEs
from tests.helpers.encoders import MODELS, save_local
from tests.helpers.training import ROOT


def png(i):
    out = io.BytesIO()
    Image.new("RGB", (32, 32), (7 * i % 256, 40, 50)).save(out, "png")
    return out.getvalue()


FILES = ("sae/sae_weights.safetensors", "sae/mmsae_state.safetensors", "latents.json")


def make_recipe(tmp_path, recipe, **options):
    with ShardWriter(tmp_path / "train", per_shard=20) as w:
        for i in range(40):
            w.write(f"{i:03d}", {"png": png(i), "txt": f"a red circle {'large ' * (i % 3)}"})
    data = {
        "shards": str(tmp_path / "train"), "host": save_local(tmp_path / "host", MODELS["vit"]), "batch_size": 6,
        "read_batch": 5, "buffer_pairs": 12, "workers": 0, "shuffle": 8, **options,
    }  # fmt: skip
    recipe = read_recipe(str(ROOT / f"configs/train/{recipe}.yaml"))
    recipe["data"] = {"class_path": "datamodules.StreamingActivations", "init_args": data}
    recipe["trainer"] |= {"max_steps": 5, "accelerator": "cpu", "enable_progress_bar": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["fit", "-c", str(tmp_path / "recipe.yaml"), "--model.sae.init_args.selector.init_args.k", "3"]


def test_members_of_a_stream(tmp_path):
    args = make_recipe(tmp_path, "paired_topk_store")
    members = {"plain": {}, "other": {"seed": 1, "ratio": 4}}
    root = tmp_path / "many"
    main([*args, "--members", json.dumps(members), "--trainer.default_root_dir", str(root)])
    one = tmp_path / "one"
    other = ["--seed_everything", "1", "--model.sae.init_args.ratio", "4", "--model.sae.init_args.d_sae", "null"]
    for name, options in (("plain", []), ("other", other)):
        main([*args, *options, "--trainer.default_root_dir", str(one / name)])
        for file in FILES:
            assert (root / name / file).read_bytes() == (one / name / file).read_bytes(), (name, file)
    # there is no validation: no figures, and nothing to draw
    assert (root / "members.md").read_text().startswith("| member | d_sae |\n") and not (root / "members.png").exists()


BLOCK = "visual.transformer.resblocks.{}:out[patches]"


def test_members_at_several_sites_of_a_stream(tmp_path, monkeypatch, capsys):
    """One pass of the host reads all of them, for the sample of the normaliser, the training and the validation."""
    args = make_recipe(
        tmp_path, "topk_store", sites={"image": BLOCK.format(1)}, buffer_pairs=200, batch_size=30, epoch_batches=3
    )
    args += ["--data.val_shards", str(tmp_path / "train"), "--model.normaliser_rows", "100"]
    passes, given = [0], Host.read

    def read(self, *more):
        passes[0] += 1
        return given(self, *more)

    monkeypatch.setattr(Host, "read", read)
    sites = {"first": {"image": BLOCK.format(0)}, "second": {"image": BLOCK.format(1)}}
    members = {"first": {"sites": sites["first"]}, "second": {}, "again": {"sites": sites["first"], "seed": 1}}
    root, one = tmp_path / "many", tmp_path / "one"
    main([*args, "--members", json.dumps(members), "--trainer.default_root_dir", str(root)])
    for name, own in sites.items():
        together, passes[0] = passes[0], 0
        main([*args, "--data.sites", json.dumps(own), "--trainer.default_root_dir", str(one / name)])
        assert passes[0] == together > 5
        for file in (*FILES, "sae/cfg.json"):
            assert (root / name / file).read_bytes() == (one / name / file).read_bytes(), (name, file)
        site = SAE.from_pretrained(root / name / "sae").sites["image"]
        assert (site.module, site.tokens) == (own["image"].split(":")[0], "patches")
    rows = json.loads((root / "members.json").read_text())["members"]
    assert rows[0]["fvu/image"] != rows[2]["fvu/image"] and all("fvu/image" in r for r in rows)

    # killed, it goes on with the batches that were left; at another site it is refused
    stop = ["--trainer.callbacks+", "tests.helpers.lit.StopAt", "--trainer.callbacks.step", "4"]
    killed = [*args, "--trainer.default_root_dir", str(tmp_path / "killed"), "--checkpoint.every_n_train_steps", "3"]
    with pytest.raises(SystemExit):
        main([*killed, "--members", json.dumps(members), *stop])
    members["first"]["sites"], members["second"]["sites"] = sites["second"], sites["first"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*killed, "--members", json.dumps(members), "--ckpt_path", "last"])
    assert "member first: sites.image is image:visual.transformer.resblocks.0.out[patches]" in capsys.readouterr().err
    members = {"first": {"sites": sites["first"]}, "second": {}, "again": {"sites": sites["first"], "seed": 1}}
    said, note = [], LitSAEs.note
    monkeypatch.setattr(LitSAEs, "note", lambda self, name, text: (said.append((name, text)), note(self, name, text)))
    main([*killed, "--members", json.dumps(members), "--ckpt_path", "last"])
    assert [name for name, text in said if text.startswith("going on after step 3")] == list(members)
    assert [r["steps"] for r in json.loads((tmp_path / "killed/members.json").read_text())["members"]] == [5, 5, 5]


def test_sites_of_a_stream_have_equally_many_rows(tmp_path, capsys):
    args = make_recipe(tmp_path, "topk_store", sites={"image": BLOCK.format(1)}, buffer_pairs=200)
    members = {
        "patches": {},
        "pooled": {"sites": {"image": "image.embed"}},
        "no": {"sites": {"image": "visual.nothing"}},
    }

    def fails():
        with pytest.raises(SystemExit) as stop:
            main([*args, "--members", json.dumps(members), "--trainer.default_root_dir", str(tmp_path / "run")])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1, said
        return said

    assert "member no: host" in fails()
    members.pop("no")
    assert "give 80 rows of a batch of the host, image image.embed give 5" in fails()
