"""What a host gives is kept in a cache folder: every image goes through it once, and nothing else changes."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from mmsae import load_pair
from mmsae.evaluation.features import load_features
from mmsae.evaluation.images import ImageChange
from mmsae.evaluation.ood.sets import generated
from mmsae.evaluation.shifts import shift
from mmsae.options import call
from mmsae.sae import random_control
from mmsae.shards import ShardWriter
from mmsae.types import InputError
from tests.helpers.evaluation import png, save_host, save_sae, write_colours

SITES = {"pooled": "image.pooled", "tokens": "visual.transformer.resblocks.1:out[patches]"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    host = save_host(folder / "host")
    return {
        "shards": write_colours(folder / "shards", 60, 0, per_shard=25),
        "other": write_colours(folder / "other", 60, 5, per_shard=25),  # of the same names, with the same uids
        **{name: save_sae(folder / name, host, site) for name, site in SITES.items()},
    }


@pytest.fixture
def opened(place, monkeypatch):
    """``open(site) -> (sae, host, seen)``; ``seen`` counts the images that go through the host."""

    def open_(site):
        sae, host = load_pair(place[site], device="cpu")
        seen, read = [], host.read
        monkeypatch.setattr(host, "read", lambda batch, sites: seen.extend(batch.uids) or read(batch, sites))
        return sae, host, seen

    return open_


def load(host, sae, shards, **more):
    return call(load_features, host, sae, shards, batch_size=16, progress=False, **more)


def same(a, b):
    assert a.uids == b.uids and torch.equal(a.labels, b.labels) and a.pool == b.pool
    for field in ("x", "recon", "error", "stats"):
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert torch.equal(a.z.to_dense(), b.z.to_dense())


@pytest.mark.parametrize("site", SITES)
def test_figures_are_the_same_and_the_host_runs_once_for_all_saes(place, opened, tmp_path, site):
    sae, host, seen = opened(site)
    plain = load(host, sae, place["shards"], embed=True)
    assert len(seen) == 60
    kept = load(host, sae, place["shards"], embed=True, cache=str(tmp_path))
    same(plain, kept)
    assert torch.equal(plain.embed, kept.embed) and len(seen) == 120
    fresh = random_control(sae, 0)
    again = load(host, fresh, place["shards"], embed=True, cache=str(tmp_path), others={"trained": sae})
    assert len(seen) == 120
    same(again.through(again.others["trained"]), plain)


@pytest.mark.parametrize("site", SITES)
def test_only_what_is_not_kept_goes_through_the_host(place, opened, tmp_path, site):
    sae, host, seen = opened(site)
    few = load(host, sae, place["shards"], limit=20, cache=str(tmp_path))
    assert sorted(seen) == sorted(few.uids)
    every = load(host, sae, place["shards"], cache=str(tmp_path))
    assert len(seen) == 60 == len(set(seen)) == every.n
    plain = load(host, sae, place["shards"])
    order = [every.uids.index(u) for u in plain.uids]
    torch.testing.assert_close(every.rows(torch.tensor(order)).x, plain.x, atol=1e-5, rtol=1e-5)
    part = load(host, sae, place["shards"], keep=set(few.uids[:7]).__contains__, cache=str(tmp_path))
    assert set(part.uids) == set(few.uids[:7]) and len(seen) == 120


def test_embeddings_that_were_not_kept_are_read_and_kept_from_then_on(place, opened, tmp_path):
    sae, host, seen = opened("tokens")
    kept = {"cache": str(tmp_path)}
    few = load(host, sae, place["shards"], limit=20, **kept)
    with_them = load(host, sae, place["shards"], keep=set(few.uids).__contains__, embed=True, **kept)
    assert len(seen) == 40 and with_them.embed.shape[0] == 20
    every = load(host, sae, place["shards"], **kept)
    assert len(seen) == 80 and every.n == 60 and every.embed is None
    again = load(host, sae, place["shards"], embed=True, **kept)
    assert len(seen) == 80 and torch.equal(again.x, every.x) and again.embed.shape[0] == 60


def test_other_shards_sites_and_changes_are_kept_apart(place, opened, tmp_path):
    sae, host, seen = opened("pooled")
    kept = {"cache": str(tmp_path)}
    a, b = (load(host, sae, place[s], **kept) for s in ("shards", "other"))
    assert a.uids == b.uids and not torch.equal(a.x, b.x) and len(seen) == 120
    grey = load(host, sae, place["shards"], change=ImageChange(shift({"grey": 1.0}), "grey"), **kept)
    made = load(host, sae, place["shards"], change=ImageChange(generated, "generated"), **kept)
    assert len(seen) == 240 and not torch.equal(grey.x, a.x) and not torch.equal(grey.x, made.x)
    same(made, load(host, sae, place["shards"], change=ImageChange(generated, "generated"), **kept))
    assert len(seen) == 240
    files = sum(1 for _ in tmp_path.rglob("*.safetensors"))
    load(host, sae, place["shards"], change=ImageChange(shift({"grey": 0.5})), **kept)
    assert sum(1 for _ in tmp_path.rglob("*.safetensors")) == files, "a change without a name is not kept"
    tokens, other, through = opened("tokens")
    load(other, tokens, place["shards"], **kept)
    assert len(through) == 60


def test_a_tar_that_changed_is_read_again(place, opened, tmp_path):
    shards = shutil.copytree(place["shards"], tmp_path / "shards")
    sae, host, seen = opened("pooled")
    load(host, sae, str(shards), cache=str(tmp_path / "cache"))
    first = min(shards.glob("*.tar"))
    os.utime(first, ns=(1, 1))
    load(host, sae, str(shards), cache=str(tmp_path / "cache"))
    assert len(seen) == 60 + 25


def test_broken_images_are_counted_every_time(opened, tmp_path):
    with ShardWriter(tmp_path / "shards", "b", per_shard=20) as w:
        for i in range(20):
            picture = png(torch.full((32, 32, 3), 10 * i, dtype=torch.uint8).numpy())
            w.write(f"{i:02d}", {"png": picture if i % 4 else b"no picture", "txt": "", "cls": str(i % 2)})
    sae, host, seen = opened("pooled")
    for _ in range(2):
        f = load(host, sae, str(tmp_path / "shards"), cache=str(tmp_path / "cache"), fault_limit=0.3)
        assert f.n == 15 and len(seen) == 15
        with pytest.raises(InputError, match="5 of 20"):
            load(host, sae, str(tmp_path / "shards"), cache=str(tmp_path / "cache"))


def test_a_run_that_dies_leaves_whole_files_only(place, opened, tmp_path, monkeypatch):
    sae, host, seen = opened("pooled")
    read = host.read

    def dies(batch, sites):
        if len(seen) >= 30:
            raise KeyboardInterrupt
        return read(batch, sites)

    with monkeypatch.context() as m:
        m.setattr(host, "read", dies)
        with pytest.raises(KeyboardInterrupt):
            load(host, sae, place["shards"], cache=str(tmp_path))
    kept = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(kept) == 1 and Path(kept[0]).suffix == ".safetensors"
    before = len(seen)
    f = load(host, sae, place["shards"], cache=str(tmp_path))
    assert f.n == 60 and len(seen) - before == 60 - 25
