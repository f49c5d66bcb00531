"""What benchmarks/ood_real.py relies on: its recipes fit its stores, and its list of shared classes fits the data."""

from pathlib import Path

import pytest

from mmsae.evaluation.labels import read_labels, read_lines
from mmsae.shards import FaultLog, expand, read_shard
from mmsae.training.cli import build_cli

ROOT = Path(__file__).parents[1]
TINY = ROOT.parent / "shared" / "data" / "tiny_imagenet"
OVERLAP = str(ROOT / "configs" / "eval" / "cifar10_overlap.txt")


@pytest.fixture(scope="module")
def ood_real():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import ood_real

        yield ood_real


def test_the_recipes_take_the_sites_and_sizes(ood_real, tmp_path):
    for recipe, more in ood_real.FITS.values():
        path = str(ROOT / "configs" / "train" / f"world_{recipe}.yaml")
        cli = build_cli(["-c", path, *more, "--trainer.default_root_dir", str(tmp_path)], run=False)
        assert cli.model.sae.d_sae == 256 and cli.model.sae.selector.k == 16
        assert set(cli.datamodule.chosen_sites) == set(cli.model.sae.modalities)


def test_the_hand_written_list_has_every_class_that_the_data_marks():
    if not TINY.is_dir():
        pytest.skip(f"needs Tiny-ImageNet in {TINY}")
    ids = set(read_lines(OVERLAP))
    marked, every = set(), set()
    paths = expand(str(TINY / "tiny_imagenet-val-*.tar.gz"))
    for path in paths:
        for s in read_shard(path, FaultLog(), need=(), decode=False):
            every.add(s.meta["wnid"])
            if s.meta["cifar10_overlap"]:
                marked.add(s.meta["wnid"])
    assert marked == ids and len(ids) == 16 and len(every) == 140
    assert len(set(read_labels(paths, "wnid").without(ids).value.values())) == 124
