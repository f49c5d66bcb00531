"""How the files in this folder were made, with the code of version 0.2.0.dev0 at commit 7115dce; kept to be read.

Run there, in this folder, it makes everything anew: ``PYTHONPATH=../../.. python make.py``. Later code need not run it,
but must read what it wrote: ``test_files_from_before.py``. All names are relative to this folder, so that a copy of it
is as good. What is called ``begun`` was written by a process that was killed in the middle.
"""

import copy
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import traceback
import warnings
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from mmsae.backbones import load_backbone
from mmsae.cache import ActivationStore, extract, write_store
from mmsae.sae import SAE, AffineEncoder, Dictionary, DistanceEncoder, Normaliser, PerModalityEncoder, TopK
from mmsae.sae.aligner import Aligner
from mmsae.types import IMAGE, TEXT

MODALITIES = (IMAGE, TEXT)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
WORDS = "a the red green blue circle square small large on left right of".split()
QUIET = {"workers": 0, "progress": False, "device": "cpu"}
FILTER = {"sae": "sae/paired", "shards": "shards", "keep": 0.5, "batch_size": 4, "per_shard": 4, "fit_samples": 16}
WEIGHTS = {"sae": "sae/tokens", "shards": "questions", "samples": None, "batch_size": 4, "workers": 0, "device": "cpu"}
WEIGHTS |= {"n_side": 2, "n_pool": 4}
ASKING = {"device": "cpu", "progress": False, "batch_size": 4}
MATCH = {**FILTER, "select": "match", "target": "questions", "select_on": "text", "balance": 0.5}
LVLM = {"sae": "sae/tokens", "shards": "questions", "score": "cos_code", "batch_size": 4, "fit_samples": 8}
PATCHES = {"sae": "sae/tokens", "shards": "questions", "scores": ["l0", "norm", "random"], "keep": [0.5], **ASKING}
POPE = {"host": "lvlm:hosts/llava", "shards": "questions", "per_image": 1, "min_objects": 1, **ASKING}
CHAIR = {"host": "lvlm:hosts/llava", "shards": "questions", **ASKING}
STEER = {
    "host": "diffusers:hosts/sd",
    "sae": "sae/words",
    "prompts": ["a red circle", "a blue square"],
    "features": [3],
}
STEER |= {"op": "set", "unit": "raw", "strengths": [2.0], "seeds": [0, 1], "steps": 2, "controls": 1, "batch_size": 2}
STEER |= {"device": "cpu", "progress": False}
FIT = ["--data.store", "pairs", "--data.batch_size", "32", "--trainer.accelerator", "cpu", "--trainer.max_steps", "12"]
FIT += ["--model.sae.init_args.ratio", "2", "--model.sae.init_args.selector.init_args.k", "3"]
FIT += ["--model.dead_after", "300", "--trainer.val_check_interval", "4", "--checkpoint.every_n_train_steps", "4"]
RECIPE = "../../../configs/train/paired_topk_store.yaml"


def killed(work, where, name, times):
    """Do ``work`` in a process that dies, as by SIGKILL, right after ``where.name`` has returned so many times."""
    pid = os.fork()
    if pid == 0:
        owner, left = (importlib.import_module(where) if isinstance(where, str) else where), [times]
        whole = getattr(owner, name)

        def dying(*args, **options):
            out = whole(*args, **options)
            left[0] -= 1
            if not left[0]:
                os._exit(9)
            return out

        setattr(owner, name, dying)
        try:
            work()
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, name


def numbers(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def clip(folder):
    """A CLIP in open_clip's folder format, small and with random weights."""
    import open_clip
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vision = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1, "mlp_ratio": 2.0}
    text = {"context_length": 10, "vocab_size": 18, "hf_tokenizer_name": "none", "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(**copy.deepcopy(config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    vocab = {w: i for i, w in enumerate(["<pad>", "<unk>", "<bos>", *WORDS, "x", "<eos>"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<bos>", vocab["<bos>"]), ("<eos>", vocab["<eos>"])]
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    names = {f"{n}_token": f"<{n}>" for n in ("pad", "unk", "bos", "eos")}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def llava(folder):
    """The world's LLaVA with a timm tower, untrained, in half precision to be small."""
    import timm

    from mmsae.backbones.lvlm_tower import TimmTowerConfig
    from mmsae.world.llava_build import build_model, build_processor, build_tokenizer

    tower = TimmTowerConfig(architecture="test_efficientnet", image_size=32, patch_size=16, levels=[3], hidden_size=48)
    torch.manual_seed(0)
    trunk = timm.create_model("test_efficientnet", pretrained=False, num_classes=0).state_dict()
    tokenizer = build_tokenizer([f"a {c} {s}" for c in COLOURS for s in ("circle", "square")])
    model = build_model(tower, trunk, tokenizer, hidden=32, layers=2, heads=2)
    model.half().save_pretrained(folder)
    processor = build_processor(tokenizer, tower, {"mean": [0.5] * 3, "std": [0.25] * 3})
    processor.save_pretrained(folder)


def pipeline(folder):
    """The world's Stable Diffusion, untrained, with its linear autoencoder."""
    from mmsae.backbones.patch_autoencoder import PatchAutoencoder
    from mmsae.world.diffusion_build import build_pipeline, build_text_encoder, build_tokenizer, build_unet

    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = PatchAutoencoder.fit(images, 4)
    tokenizer = build_tokenizer(WORDS, 8)
    text = build_text_encoder(tokenizer, 32, 1, 0)
    build_pipeline(vae, text, tokenizer, build_unet(8, 4, 32, (16,), 1)).save_pretrained(folder)


def picture(i):
    image = Image.new("RGB", (32, 32), (200, 200, 200))
    image.paste(list(COLOURS.values())[i % 3], (4 + i % 7, 4, 20, 20 + i % 5))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def shard(path, numbers, question=False):
    """A tar of pictures with captions (some wrong), or with questions, answers and objects."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in numbers:
            colour, shape = list(COLOURS)[i % 3], ("circle", "square")[i % 2]
            said = list(COLOURS)[(i + (i % 4 == 3)) % 3]
            meta = {"uid": f"{i * 7919:032x}", "class": colour}
            if question:
                meta |= {"question": f"is there a {said} {shape}?", "answer": "yes" if said == colour else "no"}
                meta |= {"objects": [f"{colour} {shape}"], "captions": [f"a {colour} {shape}"]}
            fields = {"png": picture(i), "txt": f"a {said} {shape} on the left".encode()}
            for suffix, value in {**fields, "json": json.dumps(meta).encode()}.items():
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))


def make_sae(name, sites, parts, d_in=8, training=None):
    """An SAE with random weights and a fitted normaliser, its folder, and what it computes."""
    torch.manual_seed(len(name))
    sae = SAE(d_in, 16, modalities=tuple(sites), **parts).eval()
    sae.fit_normaliser({m: numbers(40, d_in, i) + i for i, m in enumerate(sites)})
    with torch.no_grad():
        for d in sae.dictionaries.values():
            if d.bias is not None:
                d.bias.copy_(0.1 * numbers(1, d_in, 9)[0])
    sae.sites = sites
    sae.save_pretrained(f"sae/{name}", training)
    out = {}
    with torch.no_grad():
        for i, m in enumerate(sites):
            x = numbers(5, d_in, 20 + i)
            codes = sae.encode(x, m)
            out |= {
                f"{name}/{m}/x": x,
                f"{name}/{m}/codes": codes.to_dense(),
                f"{name}/{m}/x_hat": sae.decode(codes, m),
            }
    return {k: v.clone().contiguous() for k, v in out.items()}


def saes():
    host, llava, sd = (load_backbone(n) for n in ("local-dir:hosts/clip", "lvlm:hosts/llava", "diffusers:hosts/sd"))
    pair = host.default_sites()
    norm = {"unit_in": True, "centre": True, "unit_out": True}
    each = lambda *a: {m: Dictionary(*a) for m in MODALITIES}  # noqa: E731
    expected = {}
    for name, sites, parts in (
        ("plain", {IMAGE: pair[IMAGE]}, {"selector": TopK(4)}),
        ("shared", pair, {"selector": TopK(4), "normaliser": Normaliser(**norm)}),
        ("paired", pair, {"selector": TopK(4), "normaliser": Normaliser(**norm), "dictionaries": each()}),
        ("dual", pair, {"encoder": PerModalityEncoder(AffineEncoder()), "selector": TopK(4), "dictionaries": each()}),
        ("vl", pair, {"encoder": DistanceEncoder(), "selector": TopK(4), "dictionaries": each("free")}),
    ):
        expected |= make_sae(name, sites, parts, training={"steps": 7, "tokens": {m: 40 for m in sites}})
    parts = {"encoder": AffineEncoder(), "selector": TopK(4)}
    expected |= make_sae("tokens", llava.sites("layers.0:out"), parts, 32)
    words = sd.site("text_encoder.layers.0:out[all]")
    expected |= make_sae("words", {TEXT: words}, {"encoder": AffineEncoder(), "selector": TopK(4)}, 32)
    aligner = Aligner(8, 6)
    with torch.no_grad():
        for i, p in enumerate(aligner.parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    aligner.save_pretrained("aligner")
    for m in MODALITIES:
        x = numbers(5, 8, 3)
        e = aligner.align(x, m)
        expected |= {f"aligner/{m}/e": e.detach(), f"aligner/{m}/x": aligner.unalign(e, m).detach()}
    save_file(expected, "expected/saes.safetensors")


def stores():
    extract("local-dir:hosts/clip", "shards", "store", batch_size=4, **QUIET)
    begun = lambda: extract("local-dir:hosts/clip", "shards", "store_begun", batch_size=4, **QUIET)  # noqa: E731
    killed(begun, importlib.import_module("mmsae.cache.part").PartWriter, "commit", 1)
    store = ActivationStore("store")
    kept = {m: store.tokens({m: m}, {m: torch.arange(len(store)).numpy()}).x[m] for m in MODALITIES}
    save_file(kept, "expected/store.safetensors")
    g = torch.Generator().manual_seed(0)
    codes = torch.rand(200, 16, generator=g) * (torch.rand(200, 16, generator=g) < 0.15)
    shared = codes @ torch.nn.functional.normalize(torch.randn(16, 8, generator=g))
    write_store("pairs", {m: shared + s + 0.1 * torch.randn(200, 8, generator=g) for m, s in ((IMAGE, 1), (TEXT, -1))})


def filters():
    from mmsae.tasks.filter import filter_shards

    filter_shards(**FILTER, **QUIET, out="filter")
    # of the three tars fitting takes two: killed once while fitting, once while scoring
    for out, options, n in (
        ("filter_fitting", FILTER, 1),
        ("filter_scoring", FILTER, 3),
        ("filter_matching", MATCH, 2 + 2 + 1),
        ("filter_lvlm", LVLM, 2 + 1),
    ):
        job = lambda o=out, p=options: filter_shards(**p, **QUIET, out=o)  # noqa: E731
        killed(job, "mmsae.tasks.filter_run", "write_part", n)
        assert Path(f"{out}.partial/job.json").exists()
        if options is not FILTER:
            filter_shards(**options, **QUIET, out=f"expected/{out}")
            shutil.rmtree(f"expected/{out}/shards")


def questions():
    """Jobs that ask a vision-language model; each whole, and begun."""
    from mmsae.tasks.chair import chair_command
    from mmsae.tasks.concept_decoding import Settings
    from mmsae.tasks.patches import patches
    from mmsae.tasks.pope_run import pope
    from mmsae.tasks.weights import weights

    short = {"settings": Settings(max_new_tokens=3, do_sample=False)}
    units = "mmsae.shards.units"
    for name, job, where in (
        ("weights", lambda out: weights(**WEIGHTS, progress=False, out=out), "mmsae.tasks.weights_job"),
        ("patches", lambda out: patches(**PATCHES, out=out), units),
        ("pope", lambda out: pope(**POPE, **short, out=out), units),
        ("chair", lambda out: chair_command(**CHAIR, **short, out=out), units),
    ):
        job(name)
        killed(lambda j=job, n=name: j(f"{n}_begun"), where, "write_part", 1)
        for part in Path(name).glob("*.png"):
            part.unlink()  # pictures are not read back


def steering():
    import pandas as pd

    from mmsae.steering import FeatureStats
    from mmsae.steering.command import steer

    steer(**STEER, out="steer")
    killed(lambda: steer(**STEER, out="steer_begun"), pd.DataFrame, "to_parquet", 1)
    for temp in Path("steer_begun/parts").glob(".*"):  # killed before the rename: give it its name, as a kill after it
        temp.rename(temp.parent / "00000.parquet")
    for part in Path("steer").glob("*.png"):
        part.unlink()
    stats = FeatureStats.load("steer/stats")
    images = load_backbone("diffusers:hosts/sd").generate(["a red circle"], steps=2, guidance=3.0, seed=0, batch_size=1)
    save_file({"images": images, "mean_all": stats.mean_all.clone()}, "expected/steer.safetensors")


def concepts():
    from mmsae.steering.concept_stats import ConceptStats
    from mmsae.world.probe import WorldProbe

    mean = numbers(2, 3 * 4, 1).abs().view(2, 3, 4)
    ConceptStats(mean, torch.tensor([2, 3]), ("red", "blue"), 3).save("concepts.safetensors")
    torch.manual_seed(0)
    probe = WorldProbe(2).eval()
    probe.save("probe.safetensors")
    x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        said = probe(x)
    save_file({"concepts/mean": mean, **said}, "expected/concepts.safetensors")


def evaluations():
    from mmsae.heads.features import load_features
    from mmsae.heads.opening import open_host
    from mmsae.heads.zeroshot_run import zeroshot

    sae, host = open_host("sae/paired", "")
    found = load_features(host, sae, "shards", label="class", batch_size=4, embed=True, cache="cache", progress=False)
    save_file({"x": found.x, "codes": found.z.to_dense(), "embed": found.embed}, "expected/features.safetensors")
    order = {"uids": found.uids, "labels": found.labels.tolist()}
    rows = zeroshot("sae/paired", "shards", "zeroshot", label="class", device="cpu", progress=False)["rows"]
    shutil.rmtree("zeroshot")
    Path("expected/features.json").write_text(json.dumps({**order, "zeroshot": rows}, indent=1))


def fit(run):
    from mmsae.training.cli import run as lightning

    lightning(["fit", "-c", RECIPE, *FIT, "--trainer.default_root_dir", run, "--trainer.enable_progress_bar", "false"])


def runs():
    """A run that was killed at step 8 of 12, what it comes to without the kill, and a sweep of one point."""
    from mmsae.training.sweep import sweep

    checkpoints = importlib.import_module("mmsae.training.checkpoint").RunCheckpoint
    killed(lambda: fit("run"), checkpoints, "_save_last_checkpoint", 2)
    fit("whole")
    shutil.copytree("whole/sae", "expected/run_sae")
    shutil.copy("whole/latents.json", "expected/run_latents.json")
    shutil.rmtree("whole")
    shutil.rmtree("run/logs/tensorboard", ignore_errors=True)
    options = "--data.batch_size 32 --trainer.accelerator cpu"
    sweep("pairs", "sweep", k=[2], ratio=[2.0], steps=4, fit_options=options)
    for name in ("logs", "checkpoints", "sae-best"):
        shutil.rmtree(f"sweep/k2-ratio2-seed0/{name}", ignore_errors=True)
    Path("sweep/sweep.png").unlink()


def stages():
    from mmsae.bench import Stages as Bench
    from mmsae.demo_stages import Stages as Demo

    Demo(Path("demo/demo.json"), {"profile": "tiny", "seed": 0, "version": 1}).run("clip", lambda: None)
    Bench(Path("bench"), {"seeds": [0], "damage": 0.4}, False).run("stages/clip", lambda: {"accuracy": 0.5})


def main():
    os.chdir(Path(__file__).parent)
    if subprocess.run([sys.executable, "-m", "mmsae.cli", "--version"], capture_output=True).returncode:
        raise SystemExit("no mmsae here")
    for path in Path().iterdir():
        if path.name not in ("make.py", "yaml", "names.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path("expected").mkdir()
    warnings.simplefilter("ignore")
    clip(Path("hosts/clip"))
    llava(Path("hosts/llava"))
    pipeline(Path("hosts/sd"))
    for i in range(3):
        shard(Path(f"shards/{i}.tar"), range(8 * i, 8 * i + 8))
    for i in range(2):
        shard(Path(f"questions/{i}.tar"), range(4 * i, 4 * i + 4), question=True)
    for step in (saes, stores, filters, questions, steering, concepts, evaluations, runs, stages):
        print(step.__name__, flush=True)
        step()
    print(sum(p.stat().st_size for p in Path().rglob("*") if p.is_file()) / 1e6, "MB")


if __name__ == "__main__":
    main()
