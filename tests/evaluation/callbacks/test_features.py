"""Monosemanticity, tree correlation and nearest means in ``mmsae test``, equal to the plain ones and over ranks."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import one_hot

from mmsae.activations import ActivationStore, extract
from mmsae.cli import main
from mmsae.evaluation.callbacks.features import ClassMeansTest, MonosemanticityTest
from mmsae.evaluation.features import encode_features
from mmsae.evaluation.labels import read_labels
from mmsae.evaluation.ontology.measures import tree_correlation
from mmsae.evaluation.ontology.tree import Tree
from mmsae.metrics.concepts.class_means import ClassMeans, NearestMean
from mmsae.metrics.concepts.monosemanticity import Monosemanticity, monosemanticity
from mmsae.metrics.concepts.probing import matrix, nearest_mean, predictions
from mmsae.sae import SAE
from mmsae.shards import expand
from mmsae.types import Codes, InputError
from tests.helpers.evaluation import save_host, write_colours

RECIPE = str(Path(__file__).parents[3] / "configs" / "train" / "paired_topk_store.yaml")
COLOURS = {"red": (220, 30, 30), "orange": (220, 140, 20), "green": (30, 200, 40), "blue": (30, 40, 220)}
TREE = "red\twarm\norange\twarm\ngreen\tcool\nblue\tcool\n"
EVAL = Path(__file__).parents[3] / "configs" / "eval" / "test_features.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    host = save_host(folder / "host")
    for name, n, seed in (("train", 160, 0), ("test", 120, 1)):
        write_colours(folder / name, n, seed, name, COLOURS)
        extract(host, str(folder / name), folder / f"store_{name}", workers=0, progress=False)
    (folder / "tree.tsv").write_text(TREE)
    small = ["--data.batch_size", "16", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    small += ["--model.sae.init_args.ratio", "2", "--model.sae.init_args.selector.init_args.k", "4"]
    small += ["--trainer.default_root_dir", str(folder / "run")]
    main(["fit", "-c", RECIPE, "--data.store", str(folder / "store_train"), "--trainer.max_steps", "20",
          "--trainer.val_check_interval", "20", *small])  # fmt: skip
    return folder, small


def test_the_callbacks_say_what_the_plain_measures_say(place, capsys):
    folder, small = place
    text = EVAL.read_text()
    places = {"TRAIN_SHARDS": "train", "TRAIN_STORE": "store_train", "TREE": "tree.tsv", "SHARDS": "test"}
    for name, path in places.items():
        text = text.replace(f": {name}", f": {folder / path}")
    (folder / "heads.yaml").write_text(text)
    capsys.readouterr()
    main(["test", "-c", RECIPE, "-c", str(folder / "heads.yaml"), "--data.store", str(folder / "store_test"),
          "--data.val_fraction", "0", "--ckpt_path", "last", *small])  # fmt: skip
    said = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("test/"):
            said |= {k: float(v) for k, v in (p.split(" ") for p in line.split("  "))}
    sae = SAE.from_pretrained(folder / "run" / "sae")
    sets = {}
    for name in ("train", "test"):
        store, known = ActivationStore(folder / f"store_{name}"), read_labels(expand(str(folder / name)), "class")
        values = known.values_of(list(known.value))
        sets[name] = encode_features(sae, store.load(modality="image"), known.numbers(store.uids, values))
    test, train = sets["test"], sets["train"]
    judge = one_hot(test.labels, 4)
    tree = Tree.load(folder / "tree.tsv", values)
    for kind, f in (("raw", lambda s: s.x), ("code", lambda s: s.z)):
        want = monosemanticity(f(test), judge).summary()
        assert said[f"test/monosemanticity/{kind}/mean"] == pytest.approx(want["mean"], abs=2e-3)
        assert said[f"test/monosemanticity/{kind}/samples"] == 120 == test.n
        assert said[f"test/monosemanticity/{kind}/dead"] == want["dead"]
        dense = f(test).to_dense() if kind == "code" else f(test)
        means = torch.stack([dense[test.labels == c].double().mean(0) for c in range(4)])
        correlation = tree_correlation(tree, means)
        assert said[f"test/tree/{kind}"] == pytest.approx(correlation["value"], abs=1e-3)
        probe = nearest_mean(matrix(f(train)), train.labels.numpy(), 4)
        right = (predictions(probe, matrix(f(test))) == test.labels).double().mean().item()
        assert said[f"test/nearest_mean/{kind}/top1"] == pytest.approx(right, abs=0.02)
        assert said[f"test/nearest_mean/{kind}/images"] == 120


def ranked(rank, world, folder):
    """Metrics of this rank's uneven share of one fixed data set."""
    g = torch.Generator().manual_seed(0)
    n, f = 61, 9
    z = torch.rand(n, f, generator=g) * (torch.rand(n, f, generator=g) < 0.3)
    v, i = z.topk(4, dim=1)
    codes, labels, e = Codes(v, i, f), torch.arange(n) % 4 - 1, torch.randn(n, 5, generator=g)
    mine = torch.arange(n) if world == 1 else torch.arange(n)[:48] if rank == 0 else torch.arange(n)[48:]
    ms, means = Monosemanticity(f, 5), ClassMeans(3, f)
    near = NearestMean(torch.rand(3, f, generator=g))
    for part in mine.split(7):
        ms.update(codes.rows(part), e[part])
        means.update(codes.rows(part), labels[part])
        near.update(codes.rows(part), labels[part])
    scores = ms.compute()
    assert scores.samples == n
    out = {"ms": scores.score, "kind": scores.kind, "chance": torch.tensor(scores.chance), "means": means.compute()}
    torch.save({**out, **near.compute()}, f"{folder}/{world}-{rank}.pt")


def rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    ranked(rank, 2, folder)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one():
    with tempfile.TemporaryDirectory() as folder:
        ranked(0, 1, folder)
        want = torch.load(f"{folder}/1-0.pt")
        assert want["ms"].dtype == torch.float64 and want["means"].dtype == torch.float64
        mp.start_processes(rank_main, (folder,), nprocs=2, start_method="spawn")
        for rank in range(2):
            got = torch.load(f"{folder}/2-{rank}.pt")
            assert got.keys() == want.keys()
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


def test_nearest_mean_by_hand():
    near = NearestMean(torch.tensor([[1.0, 0], [0, 2], [torch.nan, torch.nan]]))
    assert near.compute() == {}
    near.update(torch.tensor([[3.0, 1], [1, 3], [1, 3], [5, 5.1]]), torch.tensor([0, 1, 0, -1]))
    got = {k: v.item() for k, v in near.compute().items()}
    assert got == {"top1": pytest.approx(2 / 3), "balanced": 0.75, "images": 3}
    means = ClassMeans(2, 2)
    means.update(torch.tensor([[1.0, 2], [3, 4], [9, 9]]), torch.tensor([0, 0, -1]))
    assert means.compute()[0].tolist() == [2, 3] and means.compute()[1].isnan().all()


def test_bad_input(place):
    folder, _ = place
    with pytest.raises(InputError, match="one of"):
        MonosemanticityTest()
    with pytest.raises(InputError, match="together"):
        ClassMeansTest("x", train="store")
    sae = SAE.from_pretrained(folder / "run" / "sae")
    module = SimpleNamespace(sae=sae, device="cpu")
    with pytest.raises(InputError, match="circular"):
        MonosemanticityTest(judge=str(folder / "store_test")).on_test_start(None, module)
    with pytest.raises(InputError, match="lacks 4 of 4 classes"):
        ClassMeansTest(str(folder / "test"), tree=str(folder / "tree.tsv"), label="cls").on_test_start(None, module)
