"""Heads in ``mmsae test``: named in YAML, equal to the plain heads, equal under one and two ranks."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmsae.activations import ActivationStore, extract
from mmsae.cli import main
from mmsae.evaluation.callbacks.classify import OODTest, ZeroShotAccuracy, ZeroShotTest
from mmsae.evaluation.features import encode_features
from mmsae.evaluation.labels import Classes, Labels
from mmsae.evaluation.ood.detectors_sae import firing_rates, rarity, recon
from mmsae.metrics.host.ood import OODScores, ood_metrics
from mmsae.sae import SAE, TopK
from mmsae.types import InputError, Tokens
from tests.helpers.evaluation import save_host, write_colours, write_noise

ROOT = Path(__file__).parents[3]
RECIPE = str(ROOT / "configs" / "train" / "paired_topk_store.yaml")
EVAL = str(ROOT / "configs" / "eval" / "test_heads.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("callbacks")
    host = save_host(folder / "host")
    shards, noise = write_colours(folder / "id", 120, 0), write_noise(folder / "noise", 37)
    for name, path, sites in (("store", shards, None), ("ood", noise, ["image.embed"])):
        extract(host, path, folder / name, sites=sites, workers=0, progress=False)
    return folder, shards


def lightning(place, *args):
    folder, _ = place
    small = ["--data.batch_size", "16", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    small += ["--model.sae.init_args.ratio", "2", "--model.sae.init_args.selector.init_args.k", "4"]
    main([args[0], "-c", RECIPE, *args[1:], "--data.store", str(folder / "store"), "--trainer.default_root_dir",
          str(folder / "run"), *small])  # fmt: skip


def test_the_recipe_runs_and_says_what_the_plain_heads_say(place, capsys):
    folder, shards = place
    lightning(place, "fit", "--trainer.max_steps", "20", "--trainer.val_check_interval", "20")
    capsys.readouterr()
    heads = (folder / "heads.yaml", Path(EVAL).read_text())
    heads[0].write_text(heads[1].replace("shards: shards", f"shards: {shards}").replace("store_noise", f"{folder}/ood"))
    lightning(place, "test", "-c", str(heads[0]), "--ckpt_path", "last", "--data.val_fraction", "0")
    said = {}
    for line in capsys.readouterr().out.splitlines():
        pairs = line.split("  ")
        if line.startswith("test/"):
            said |= {k: float(v) for k, v in (p.split(" ") for p in pairs)}
    sae = SAE.from_pretrained(folder / "run" / "sae")
    store, ood = ActivationStore(folder / "store"), ActivationStore(folder / "ood")
    f, g = (encode_features(sae, s.load(modality="image")) for s in (store, ood))
    want = ood_metrics(recon(f), recon(g))
    assert said["test/ood/recon/noise/auroc"] == pytest.approx(want.auroc, abs=2e-3)
    assert said["test/ood/recon/noise/n_ood"] == 37 and said["test/ood/recon/noise/n_id"] == 120
    assert said["test/ood/recon/mean-far/auroc"] == pytest.approx(said["test/ood/recon/noise/auroc"], abs=1e-3)
    assert 0 <= said["test/ood/rarity/noise/fpr95_ood_positive"] <= 1
    for kind in ("raw", "recon", "code", "enhanced"):
        assert 0 <= said[f"test/zeroshot/{kind}/top1"] <= 1
    assert said["test/zeroshot/images"] == 120 and said["test/zeroshot/raw/top5"] == 1


def ranked(rank, world, folder):
    """Metrics of this rank's share of one fixed data set."""
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(51, 4, generator=g), torch.arange(51) % 3  # class 3 has no image
    a, b = torch.randn(51, generator=g) + 1, torch.randn(30, generator=g)
    mine = slice(0, 51) if world == 1 else slice(0, 40) if rank == 0 else slice(40, 51)
    acc, ood = ZeroShotAccuracy(("raw", "code"), 4), OODScores(0.5)
    for part in torch.arange(51)[mine].split(7):
        acc.update({"raw": scores[part], "code": -scores[part]}, labels[part])
        ood.update(a[part], ood=False)
    ood.update(b[rank::world], ood=True)
    torch.save({"acc": acc.compute(), "ood": tuple(ood.compute())}, f"{folder}/{world}-{rank}.pt")


def rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    ranked(rank, 2, folder)
    dist.destroy_process_group()


def test_two_ranks_equal_one():
    with tempfile.TemporaryDirectory() as folder:
        ranked(0, 1, folder)
        want = torch.load(f"{folder}/1-0.pt")
        mp.start_processes(rank_main, (folder,), nprocs=2, start_method="spawn")
        for rank in range(2):
            got = torch.load(f"{folder}/2-{rank}.pt")
            assert got["ood"] == want["ood"] and got["acc"].keys() == want["acc"].keys()
            assert all(torch.equal(got["acc"][k], v) and v.dtype == torch.float64 for k, v in want["acc"].items())


def test_accuracy_by_hand():
    m = ZeroShotAccuracy(("raw",), 3)
    assert m.compute() == {}
    m.update({"raw": torch.eye(3)[[0, 0, 1, 0]]}, torch.tensor([0, 0, 1, 1]))
    got = {k: v.item() for k, v in m.compute().items()}
    assert got == {"images": 4, "raw/top1": 0.75, "raw/top5": 1, "raw/balanced": 0.75}


def test_rates_are_those_of_the_training_codes():
    from mmsae.types import Codes

    z = Codes(torch.tensor([[1.0], [2.0]]), torch.tensor([[0], [0]]), 2)
    assert firing_rates(z).tolist() == [0.75, 0.25]
    assert rarity(z, firing_rates(z))[0].item() == pytest.approx(2 * torch.tensor(0.75).log().item())


def test_images_without_a_label_are_left_out(place):
    g = torch.Generator().manual_seed(0)
    sae = SAE(6, 12, modalities=("image", "text"), selector=TopK(4)).requires_grad_(False)
    test = ZeroShotTest("shards")
    test.named, test.vectors = Classes(["a", "b"], [0, 1]), torch.randn(2, 6, generator=g)
    test.metric, test.known = ZeroShotAccuracy(("raw", "recon", "code", "enhanced"), 2), Labels({"u": 1, "v": None}, {})
    x = torch.randn(2, 6, generator=g)
    test.on_test_batch_end(None, SimpleNamespace(sae=sae), None, Tokens.pooled({"image": x}, ["u", "v"]), 0)
    assert test.metric.compute()["images"] == 1
    with pytest.raises(InputError, match="1 of 1 test images"):  # an image that the shards do not have
        test.on_test_batch_end(None, SimpleNamespace(sae=sae), None, Tokens.pooled({"image": x}, ["w", "v"]), 0)


def test_bad_input(place):
    shards = place[1]
    with pytest.raises(InputError, match="near names 'x'"):
        OODTest({"a": "b"}, ["x"])
    sae = SAE(16, 32, modalities=("image",))
    with pytest.raises(InputError, match=r"needs an SAE of image\.embed and text\.embed"):
        ZeroShotTest(shards).on_test_start(None, SimpleNamespace(sae=sae))
