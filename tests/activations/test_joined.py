"""Stores of the same items as one: joined by uid, whatever their orders, and what one lacks is left out and counted."""

import pickle

import numpy as np
import pytest
import torch

from datamodules import CachedActivations
from mmsae.activations import StoreLoader, write_store
from mmsae.activations.joined import JoinedStores, open_stores
from mmsae.activations.resident import ResidentRows
from mmsae.types import InputError, Site

N = 50


def site(host, module, width, **kw):
    return Site(host * 32, module, width=width, **{"tokens": "cls"} | kw)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Rows say their item: a's are i, b's i + 100 in another order without five, c's three tokens of an item each."""
    root, g = tmp_path_factory.mktemp("joined"), torch.Generator().manual_seed(0)
    uid = [f"{i:032x}" for i in range(N)]
    order = torch.randperm(N, generator=g)[: N - 5]
    a = {"image": torch.arange(N).float()[:, None].expand(-1, 4), "text": -torch.arange(N).float()[:, None]}
    sites = {"image": site("a", "blocks.3", 4), "text": site("a", "text.embed", 1, modality="text")}
    write_store(root / "a", a, uid, sites=sites, rows_per_shard=20, captions=[f"caption {i}" for i in range(N)])
    x = {"image": order.float()[:, None] + torch.tensor([100.0, 200.0])}
    write_store(root / "b", x, [uid[i] for i in order], sites={"image": site("b", "blocks.3", 2)}, rows_per_shard=16)
    x = {"image": order.repeat_interleave(3)[:, None] + torch.tensor([0.0, 0.1, 0.2]).repeat(N - 5)[:, None]}
    sites = {"image": site("a", "blocks.6", 1, tokens="patches")}
    items = {"image": torch.arange(N - 5).repeat_interleave(3)}
    write_store(root / "c", x, [uid[i] for i in order], sites=sites, items=items, rows_per_shard=16)
    return [str(root / name) for name in "abc"], sorted(order.tolist())


A, B, C = (f"image/blocks.{n}" for n in (f"3:out[cls]@{'a' * 12}", f"3:out[cls]@{'b' * 12}", "6:out[patches]"))


def test_rows_of_one_item_come_together(folders):
    names, kept = folders
    s = JoinedStores(names)
    assert (
        list(s.spec.sites) == [A, "text", B, C]
        and len(s) == 45
        and s.left_out == dict(zip(names, [5, 0, 0], strict=True))
    )
    assert [int(u, 16) for u in s.uids] == kept and s.captions == [f"caption {i}" for i in kept]
    one = torch.tensor(kept).float()
    assert torch.equal(s.load(A)[:, 0], one) and torch.equal(s.load(B), one[:, None] + torch.tensor([100.0, 200.0]))
    assert torch.allclose(s.load(C)[:, 0], one.repeat_interleave(3) + torch.tensor([0, 0.1, 0.2]).repeat(45))
    assert s.load(C, uids=[s.uids[7], s.uids[2]])[:, 0].round().tolist() == [kept[7]] * 3 + [kept[2]] * 3
    t = s.tokens({"image": C}, {"image": np.array([0, 4, 134])})
    assert [int(t.uids[i], 16) for i in t.item["image"]] == [kept[0], kept[1], kept[44]]
    again = pickle.loads(pickle.dumps(s))
    assert again.spec.content_hash == s.spec.content_hash != JoinedStores(names[:2]).spec.content_hash
    s.verify()


def test_batches_and_rows_on_a_device(folders):
    s = JoinedStores(folders[0])
    for sites in ({"image": B, "text": "text"}, {"image": C}):
        loader = StoreLoader(s, 10, split=(0.2, 1.0), sites=sites)
        device = StoreLoader(s, 10, split=(0.2, 1.0), sites=sites)
        device.put(torch.device("cpu"), ResidentRows(s, device.names, "cpu"))
        for a, b in zip(loader, device, strict=True):
            assert all(torch.equal(a.x[m], b.x[m]) for m in a.x)
            if "text" in sites:
                assert torch.equal(a.x["image"][:, 0] - 100, -a.x["text"][:, 0])


def test_a_datamodule_of_several_stores(folders, capsys):
    names, kept = folders
    data = CachedActivations(names, batch_size=8, val_fraction=0.2)
    data.read_at({"a": {"image": A, "text": "text"}, "b": B})
    assert data.at("b").d_in == 2 and data.at("b").sites["image"].host == "b" * 32
    assert data.at("b").activations is data.activations
    for batch in data.train_dataloader():
        assert torch.equal(batch.of["a"].x["image"][:, 0] + 100, batch.of["b"].x["image"][:, 0])
    seen = torch.cat([b.of["b"].x["image"][:, 0] for b in data.val_dataloader()]) - 100
    assert len(seen) == 9 and set(seen.int().tolist()) < set(kept)


def test_bad_rows_are_found(folders, tmp_path):
    uid = [f"{i:032x}" for i in range(N)]
    x = {"image": torch.ones(N, 2)}
    x["image"][7] = float("nan")
    bad = write_store(tmp_path / "bad", x, uid[::-1], sites={"image": site("d", "x", 2)})
    s = JoinedStores([folders[0][0], bad])
    assert s.not_finite("image/x:out[cls]").tolist() == [N - 1 - 7]
    with pytest.raises(InputError, match="1 of 50 image rows in the split 0 to 1 are not finite"):
        StoreLoader(s, 4, sites={"image": "x"})


def test_what_cannot_be_joined(folders, tmp_path):
    a, b, _ = folders[0]
    with pytest.raises(InputError, match="both hold image:"):
        JoinedStores([a, a])
    other = write_store(tmp_path / "o", {"image": torch.ones(3, 2)}, list("xyz"), sites={"image": site("e", "y", 2)})
    with pytest.raises(InputError, match="have no uid in common"):
        JoinedStores([a, other])
    with pytest.raises(InputError, match="3: the store holds 2 sites of that description"):
        JoinedStores([a, b]).spec.resolve("blocks.3")
    with pytest.raises(InputError, match="there is no such folder"):
        open_stores([a, tmp_path / "none"])
    assert len(open_stores([a])) == N
