"""Members at several sites of one modality: each is, to the bit, what a run of its own at that site would give."""

import json

import pytest
import torch

from datamodules import CachedActivations
from mmsae import SAE
from mmsae.activations import ActivationStore, write_store
from mmsae.activations.spec import name_sites
from mmsae.cli import main
from mmsae.sae import Reconstruction, TopK
from mmsae.training import LitSAE, LitSAEs
from mmsae.types import InputError, Site
from tests.helpers.lit import trainer
from tests.helpers.training import RECIPE, ROOT

TOPK = str(ROOT / "configs/train/topk_store.yaml")
DEEP, FLAT, PATCHES = "blocks.6:out[cls]", "blocks.3:out[cls]", "blocks.3:out[patches]"
NAMES = ("blocks.3_out_cls", "blocks.6_out_cls", "blocks.3_out_patches")
SMALL = [
    *("--data.batch_size", "32", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--model.sae.init_args.selector.init_args.k", "3", "--model.sae.init_args.ratio", "3"),
    *("--model.dead_after", "500", "--trainer.max_steps", "20", "--trainer.val_check_interval", "10"),
]
FILES = ("sae_weights.safetensors", "mmsae_state.safetensors", "cfg.json", "../latents.json", "../sae-best/cfg.json")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two layers of different widths, patches of one of them, and a text, of one host."""
    g, n = torch.Generator().manual_seed(0), 300
    sites = name_sites(
        [
            Site("h" * 32, "blocks.3", tokens="cls", width=16),
            Site("h" * 32, "blocks.6", tokens="cls", width=24),
            Site("h" * 32, "blocks.3", tokens="patches", width=16),
            Site("h" * 32, "text.embed", modality="text", width=16),
        ]
    )
    assert list(sites) == [f"image/{FLAT}", f"image/{DEEP}", f"image/{PATCHES}", "text"]
    codes = torch.rand(n, 40, generator=g) * (torch.rand(n, 40, generator=g) < 0.1)
    x, items = {}, {}
    for name, site in sites.items():
        each = 5 if site.tokens == "patches" else 1
        rows = codes.repeat_interleave(each, 0) @ torch.randn(40, site.width, generator=g)
        x[name], items[name] = (
            rows + 0.1 * torch.randn(n * each, site.width, generator=g),
            torch.arange(n * each) // each,
        )
    folder = tmp_path_factory.mktemp("sites") / "store"
    return str(write_store(folder, x, sites=sites, items=items, rows_per_shard=128))


def fit(store, root, *args, recipe=TOPK, command="fit"):
    options = ["--data.store", store, "--trainer.default_root_dir", root, *SMALL, *args]
    main([command, "-c", recipe, *map(str, options)])


def same(one, other, files=FILES):
    for file in files:
        assert (one / "sae" / file).read_bytes() == (other / "sae" / file).read_bytes(), (one, file)


MEMBERS = {
    "early": {"sites": FLAT},
    "late": {"sites": {"image": DEEP}, "k": 4},
    "again": {"sites": FLAT, "seed": 1},
    "patches": {"data": {"sites": PATCHES}},
}


def test_each_is_what_a_run_of_its_own_writes(store, tmp_path, capsys):
    """Widths, rows and epochs differ between the sites: 8 batches of items an epoch, 42 of patches."""
    fit(store, tmp_path / "many", "--members", json.dumps(MEMBERS))
    alone = {
        "early": ["--data.sites", FLAT],
        "late": ["--data.sites", json.dumps({"image": DEEP}), "--model.sae.init_args.selector.init_args.k", 4],
        "again": ["--data.sites", FLAT, "--seed_everything", 1],
        "patches": ["--data.sites", PATCHES],
    }
    for name, options in alone.items():
        fit(store, tmp_path / "one" / name, *options)
        same(tmp_path / "many" / name, tmp_path / "one" / name)
    held = ActivationStore(store).spec.sites
    for name, site in (("early", FLAT), ("late", DEEP), ("again", FLAT), ("patches", PATCHES)):
        sae = SAE.from_pretrained(tmp_path / "many" / name / "sae")
        assert sae.sites == {"image": held[f"image/{site}"]} and sae.d_in == {"image": 24 if name == "late" else 16}
    rows = json.loads((tmp_path / "many/members.json").read_text())["members"]
    assert [r.get("sites") for r in rows] == [FLAT, {"image": DEEP}, FLAT, PATCHES]

    # measured again
    capsys.readouterr()
    fit(store, tmp_path / "many", "--members", json.dumps(MEMBERS), "--ckpt_path", "last", command="validate")
    said = capsys.readouterr().out
    assert all(f"{r['member']}: val/fvu/image {r['fvu/image']:.4g}" in said for r in rows)


def test_a_killed_run_goes_on(store, tmp_path, capsys):
    axes = ["--axes.sites", json.dumps([FLAT, {"image": DEEP}, PATCHES]), "--checkpoint.every_n_train_steps", 7]
    last = ["--ckpt_path", "last"]
    fit(store, tmp_path / "whole", *axes)
    stop = ["--trainer.callbacks+", "tests.helpers.lit.StopAt", "--trainer.callbacks.step", 16]
    with pytest.raises(SystemExit):  # Lightning's answer to an interrupt
        fit(store, tmp_path / "killed", *axes, *stop)
    assert not list(tmp_path.glob("killed/*/sae"))
    capsys.readouterr()
    fit(store, tmp_path / "killed", *axes, *last)
    assert "going on after step 14" in capsys.readouterr().out
    for name in NAMES:
        same(tmp_path / "whole" / name, tmp_path / "killed" / name)
    with pytest.raises(SystemExit):
        other = dict(zip(NAMES, [PATCHES, DEEP, FLAT], strict=True))
        fit(store, tmp_path / "killed", "--members", json.dumps({n: {"sites": s} for n, s in other.items()}), *last)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"member {NAMES[0]}: sites.image is image:blocks.3.out[cls]" in said, said


def test_pairs_share_the_items_of_a_batch(store):
    """The order is of items: all choices have the same of them, also beside a text."""
    data = CachedActivations(store, batch_size=16, uids=True)
    data.read_at({"flat": {"image": FLAT}, "pair": {"image": DEEP, "text": "text.embed"}})
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch.of["flat"].uids == batch.of["pair"].uids
            assert batch.of["pair"].paired() and set(batch.of["flat"].x) == {"image"}
    data.read_at({"flat": {"image": FLAT}, "patches": {"image": PATCHES}})
    at = [{name: len(tokens.item["image"].unique()) for name, tokens in b.of.items()} for b in data.val_dataloader()]
    assert sum(b.get("flat", 0) for b in at) == 30 and sum(len(b) == 1 for b in at) == 8


def test_rows_on_a_device_are_moved_once(store, tmp_path):
    data = CachedActivations(store, batch_size=16, resident=True)
    choices = {name: {"image": name} for name in (FLAT, DEEP)} | {"both": {"image": FLAT, "text": "text.embed"}}
    data.read_at(choices)
    plain = CachedActivations(store, batch_size=16)
    plain.read_at(choices)
    moved, read = data.train_dataloader(), plain.train_dataloader()
    for a, b in zip(moved, read, strict=True):
        assert all(torch.equal(a.of[c].x[m], x) for c in choices for m, x in b.of[c].x.items())
    assert data.resident_bytes == 300 * 4 * (16 + 24 + 16)
    rows = [loader.resident.x["image"] for loader in moved.loaders.values()]
    assert rows[0] is rows[2] and rows[0] is not rows[1]


def test_without_the_command_line(store, tmp_path):
    def member():
        torch.manual_seed(0)
        made = LitSAE(SAE(None, 48, modalities=("image",), selector=TopK(4)), [Reconstruction()])
        made.seed = 0
        return made

    sites = {"a": FLAT, "b": {"image": DEEP}}
    many = LitSAEs({name: member() for name in sites}, sites)
    trainer(tmp_path / "many", 6).fit(many, datamodule=CachedActivations(store, 32))
    for name, at in sites.items():
        one = member()
        trainer(tmp_path / name, 6).fit(one, datamodule=CachedActivations(store, 32, sites=at))
        state = many.each()[name].state_dict()
        assert all(torch.equal(v, state[k]) for k, v in one.state_dict().items())
    with pytest.raises(InputError, match="sites are given for a, the members are a, b"):
        LitSAEs({"a": member(), "b": member()}, {"a": FLAT})


def test_bad_input_is_one_sentence(store, tmp_path, capsys):
    def fails(*args, **kw):
        with pytest.raises(SystemExit) as stop:
            fit(store, tmp_path / "bad", *args, **kw)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and not (tmp_path / "bad").exists(), err
        return err

    said = fails("--members", json.dumps({"a": {"sites": FLAT}, "b": {"sites": {"image": "blocks.9"}}}))
    assert "member b: site blocks.9 and modality image: the store holds 0 sites" in said
    assert f"it has image/{FLAT} ({FLAT}), image/{DEEP} ({DEEP})" in said
    said = fails("--members", json.dumps({"a": {"sites": FLAT}, "b": {}}))
    assert "member b: modality image: the store holds 3 sites of that description, 1 is needed" in said
    said = fails("--axes.sites", json.dumps([FLAT, DEEP]), "--model.sae.init_args.d_in", 16)
    assert "member blocks.6_out_cls: the data has image activations of width 24, the SAE takes 16" in said
    said = fails("--members", json.dumps({"a": {"sites": FLAT}, "b": {"sites": DEEP}}), recipe=RECIPE)
    assert "member a:" in said and "text" in said
    said = fails("--axes.sites", json.dumps([FLAT, {"image": FLAT}]))
    assert "two would be named blocks.3_out_cls" in said


def test_stores_side_by_side(store, tmp_path, capsys):
    """Layers in two stores of the same items, in another order: as if they lay in one."""
    one = ActivationStore(store)
    folders = []
    for i, at in enumerate((FLAT, DEEP)):
        order = torch.randperm(len(one), generator=torch.Generator().manual_seed(i)) if i else torch.arange(len(one))
        site = one.spec.sites[f"image/{at}"]
        uids = [one.uids[j] for j in order]
        folders.append(str(tmp_path / f"store{i}"))
        write_store(folders[-1], {"image": one.load(at)[order]}, uids, sites={"image": site}, rows_per_shard=100)
    members = {name: MEMBERS[name] for name in ("early", "late")}
    fit(store, tmp_path / "one", "--members", json.dumps(members))
    fit(json.dumps(folders), tmp_path / "two", "--members", json.dumps(members))
    for name in members:
        same(tmp_path / "one" / name, tmp_path / "two" / name)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        fit(json.dumps([store, folders[0]]), tmp_path / "bad", "--members", json.dumps(members))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "both hold image:blocks.3.out[cls]" in said and not (tmp_path / "bad").exists()
