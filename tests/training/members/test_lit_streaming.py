"""Members of a run on a stream: the host runs once for all, and each is what a run of its own would give."""

import io
import json

import yaml
from PIL import Image

from mmsae.cli import main
from mmsae.recipes import read_recipe
from mmsae.shards import ShardWriter
from tests.helpers.encoders import MODELS, save_local
from tests.helpers.training import ROOT


def png(i):
    out = io.BytesIO()
    Image.new("RGB", (32, 32), (7 * i % 256, 40, 50)).save(out, "png")
    return out.getvalue()


def test_members_of_a_stream(tmp_path):
    with ShardWriter(tmp_path / "train", per_shard=20) as w:
        for i in range(40):
            w.write(f"{i:03d}", {"png": png(i), "txt": f"a red circle {'large ' * (i % 3)}"})
    data = {
        "shards": str(tmp_path / "train"), "host": save_local(tmp_path / "host", MODELS["vit"]), "batch_size": 6,
        "read_batch": 5, "buffer_pairs": 12, "workers": 0, "shuffle": 8,
    }  # fmt: skip
    recipe = read_recipe(str(ROOT / "configs/train/paired_topk_store.yaml"))
    recipe["data"] = {"class_path": "datamodules.StreamingActivations", "init_args": data}
    recipe["trainer"] |= {"max_steps": 5, "accelerator": "cpu", "enable_progress_bar": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    args = ["fit", "-c", str(tmp_path / "recipe.yaml"), "--model.sae.init_args.selector.init_args.k", "3"]
    members = {"plain": {}, "other": {"seed": 1, "ratio": 4}}
    root = tmp_path / "many"
    main([*args, "--members", json.dumps(members), "--trainer.default_root_dir", str(root)])
    one = tmp_path / "one"
    other = ["--seed_everything", "1", "--model.sae.init_args.ratio", "4", "--model.sae.init_args.d_sae", "null"]
    for name, options in (("plain", []), ("other", other)):
        main([*args, *options, "--trainer.default_root_dir", str(one / name)])
        for file in ("sae/sae_weights.safetensors", "sae/mmsae_state.safetensors", "latents.json"):
            assert (root / name / file).read_bytes() == (one / name / file).read_bytes(), (name, file)
    # there is no validation: no figures, and nothing to draw
    assert (root / "members.md").read_text().startswith("| member | d_sae |\n") and not (root / "members.png").exists()
