"""StoreLoader: what is in an epoch, in which order, on which rank, and from where it goes on."""

import numpy as np
import pytest
import torch

from mmsae.activations import ActivationStore, StoreLoader, write_store
from mmsae.activations import resident as resident_module
from mmsae.activations.loader import split_items
from mmsae.activations.resident import ResidentRows, make_resident, resident_bytes
from mmsae.types import InputError
from tests.helpers.stores import peak

N = 1000


def make(folder, n=N, **kw):
    rows = torch.arange(n).float()[:, None]
    return ActivationStore(write_store(folder, {"image": rows, "text": rows + 0.5}, **kw))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make(tmp_path_factory.mktemp("s") / "store", rows_per_shard=130)


def rows(loader):
    return [b.x["image"][:, 0].int().tolist() for b in loader]


def flat(batches):
    return [x for b in batches for x in b]


def test_an_epoch_is_every_row_once_in_full_batches(store):
    loader = StoreLoader(store, 32, block=16, window=4)
    first, second = rows(loader), rows(loader)
    assert len(first) == len(loader) == 31 and {len(b) for b in first} == {32}
    assert len(set(flat(first))) == 31 * 32
    assert flat(first) != flat(second)
    missing = [set(range(N)) - set(flat(e)) for e in (first, second)]
    assert missing[0] != missing[1]  # other rows are left out in each epoch


def test_pairs_stay_pairs(store):
    for b in StoreLoader(store, 50, block=7, window=3, uids=True):
        assert torch.equal(b.x["text"], b.x["image"] + 0.5) and b.paired()
        assert [int(u, 16) for u in b.uids] == b.x["image"][:, 0].int().tolist()
        assert b.x["image"].dtype == torch.float32


def test_the_order_derives_from_seed_and_epoch(store):
    same = [rows(StoreLoader(store, 100, seed=3)) for _ in range(2)]
    assert same[0] == same[1] != rows(StoreLoader(store, 100, seed=4))
    a = StoreLoader(store, 100, seed=3)
    a.epoch = 1
    b = StoreLoader(store, 100, seed=3)
    rows(b)
    assert rows(a) == rows(b)


@pytest.mark.parametrize(("block", "window"), [(1, 1), (10, 4), (10**6, 1)])
def test_rows_are_mixed(store, block, window):
    order = np.array(flat(rows(StoreLoader(store, 10, block=block, window=window))))
    # two neighbours of a shuffled list of n are n / 3 apart on average; of blocks, hardly less
    assert np.abs(np.diff(order)).mean() > N / 3 * 0.7


def test_blocks_are_read_together(store):
    """With a window of 4 blocks, 40 rows in a row come from 4 runs of 10 neighbours."""
    loader = StoreLoader(store, 10, block=10, window=4)
    order = flat(rows(loader))
    for lo in range(0, 960, 40):
        assert len({r // 10 for r in order[lo : lo + 40]}) == 4


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [8, 1, 10**4])
def test_ranks_share_an_epoch(store, world, batch):
    loaders = [StoreLoader(store, batch, rank=r, world=world, block=16) for r in range(world)]
    per_rank = [rows(loader) for loader in loaders]
    assert {len(b) for b in per_rank} == {len(loaders[0])}
    assert {len(b) for r in per_rank for b in r} == {min(batch, N // world)}
    seen = flat(flat(per_rank))
    assert len(seen) == len(set(seen)) > N - world * min(batch, N // world)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [8, 1, 10**4])
def test_validation_is_every_row_once_and_even_over_ranks(store, world, batch):
    loaders = [StoreLoader(store, batch, rank=r, world=world, shuffle=False, split=(0, 0.1)) for r in range(world)]
    per_rank = [rows(loader) for loader in loaders]
    assert {len(b) for b in per_rank} == {len(loaders[0])}
    sizes = {len(b) for r in per_rank for b in r}
    assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0 and max(sizes) <= max(batch, 2)
    assert sorted(flat(flat(per_rank))) == np.flatnonzero(split_items(store, 0, 0.1)).tolist()
    if world == 1:
        assert flat(per_rank[0]) == sorted(flat(per_rank[0]))


def test_splits_are_disjoint_complete_and_the_same_for_every_seed(store):
    parts = [split_items(store, a, b) for a, b in ((0, 0.1), (0.1, 0.35), (0.35, 1))]
    assert [p.sum() for p in parts] == [100, 250, 650] and (sum(p.astype(int) for p in parts) == 1).all()
    seen = [set(flat(rows(StoreLoader(store, 1, seed=s, split=(0.1, 1))))) for s in (0, 1)]
    assert seen[0] == seen[1] == set(np.flatnonzero(~parts[0]).tolist())
    middle = np.flatnonzero(parts[0]).mean()
    assert abs(middle - N / 2) < 100  # not a corner of the store


@pytest.mark.parametrize("done", [0, 1, 3, 4, 5, 9, 10, 14, 20])
@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_loader_goes_on_at_the_next_batch(store, done, world):
    def make_loader():
        return StoreLoader(store, 95, rank=world - 1, world=world, block=16, window=8, seed=2)

    whole = make_loader()
    n = len(whole)
    batches = flat([rows(whole) for _ in range(5)])
    stopped = make_loader()
    got, state = [], stopped.state_dict()
    while len(got) < done:
        for b in stopped:
            got.append(b.x["image"][:, 0].int().tolist())
            if len(got) == done:
                state = stopped.state_dict()
                break
    assert state["epoch"] * n + state["batch"] == done
    again = make_loader()
    again.load_state_dict(state)
    assert len(again) == n
    rest = []
    while len(rest) < len(batches) - done:
        rest += rows(again)
    assert got + rest == batches


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 11}, r"batches over all ranks \(batch_size .*\) of {'image': 10"),
        ({"seed": 9}, "seed 0, this run has 9"),
        ({"world": 2}, r"of {'image': 10, 'text': 10}, this run has {'image': 20, 'text': 20}"),
        ({"world": 3, "batch_size": 3}, r"this run has {'image': 9"),
        ({"split": (0.2, 1)}, r"split \(val_fraction to 1\) \[0\.0, 1\.0\], this run has \[0\.2, 1\.0\]"),
        ({"split": (0.001, 1)}, "val_fraction"),  # as many batches, of other items
    ],
)
def test_a_state_of_another_order_is_refused(store, change, words):
    state = StoreLoader(store, 10).state_dict()
    with pytest.raises(InputError, match=words):
        StoreLoader(store, **({"batch_size": 10} | change)).load_state_dict(state)


def test_a_state_without_the_split_is_that_of_an_earlier_version(store):
    state = StoreLoader(store, 10).state_dict()
    del state["order"]["split"]
    StoreLoader(store, 10).load_state_dict(state)
    with pytest.raises(InputError, match=r"batches per epoch \(val_fraction or limit_train_batches\) \d+, this run"):
        StoreLoader(store, 10, split=(0.2, 1)).load_state_dict(state)


def test_a_state_of_another_store_is_refused(store, tmp_path):
    other = make(tmp_path / "other")
    with pytest.raises(InputError, match="content_hash"):
        StoreLoader(other, 10).load_state_dict(StoreLoader(store, 10).state_dict())


def test_too_few_items_for_the_ranks(store):
    with pytest.raises(InputError, match=r"1 of 1000 items .* fewer than 2 ranks"):
        StoreLoader(store, 10, split=(0, 0.001), world=2)


def test_a_split_below_a_batch_is_one_smaller_batch(store):
    loader = StoreLoader(store, 512, split=(0, 0.1))
    assert [len(b) for b in rows(loader)] == [100]


def test_token_sites_have_a_fixed_quota_per_modality(tmp_path):
    n, per = 100, {"image": 9, "text": 3}
    items = {m: torch.arange(n).repeat_interleave(k) for m, k in per.items()}
    x = {m: torch.stack([i, torch.arange(len(i))], 1).float() for m, i in items.items()}
    s = ActivationStore(write_store(tmp_path / "s", x, items=items, rows_per_shard=30))
    loader = StoreLoader(s, 45, split=(0.2, 1), uids=True, block=8)
    train = set(np.flatnonzero(split_items(s, 0.2, 1)).tolist())
    seen = {m: [] for m in per}
    for b in loader:
        assert len(b.x["image"]) == 45 and len(b.x["text"]) == 15
        for m in per:
            assert [int(b.uids[i], 16) for i in b.item[m]] == b.x[m][:, 0].int().tolist()
            seen[m] += b.x[m][:, 1].int().tolist()
            assert set(b.x[m][:, 0].int().tolist()) <= train
    assert len(loader) == 16
    for m, k in per.items():
        assert len(set(seen[m])) == len(seen[m]) == 80 * k
    assert StoreLoader(s, 45, quotas={"image": 10, "text": 10}).sizes == {"image": 10, "text": 10}
    held = [b for b in StoreLoader(s, 45, split=(0, 0.2), shuffle=False)]
    assert sum(len(b.x["image"]) for b in held) == 180 and sum(len(b.x["text"]) for b in held) == 60


def test_memory_does_not_grow_with_the_store(tmp_path):
    def run(n):
        path = tmp_path / str(n)
        write_store(path, {"image": torch.zeros(n, 2048)}, rows_per_shard=500)

        def work(i):
            for _ in StoreLoader(ActivationStore(path, verify=False), 64, block=16, window=4):
                pass

        return peak(work)

    few, many = run(2000), run(16000)  # 16 and 131 MB
    assert many < few + 30_000_000, (few, many)


def test_the_order_is_what_it_was():
    """A change of the order would silently break the resuming of older runs."""
    from mmsae.activations.loader import BlockOrder

    order = BlockOrder(np.array([1, 1, 0, 1, 1, 1, 1, 0, 1, 1], bool), 3, 5)
    assert len(order) == 8
    assert order.span(None, 0, 8).tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    whole = order.span(0, 0, 8).tolist()
    assert [order.span(0, a, b).tolist() for a, b in ((2, 5), (3, 3), (7, 8))] == [whole[2:5], [], whole[7:]]
    assert sorted(whole) == [0, 1, 3, 4, 5, 6, 8, 9] and whole != sorted(whole)


def resident(loader):
    loader.put(torch.device("cpu"), ResidentRows(loader.store, loader.names, "cpu"))
    return loader


def same(a, b):
    """Whether two batches are equal in every field, tensors to the bit and in type."""
    for u, v in zip(a, b, strict=True):
        if isinstance(u, dict):
            assert u.keys() == v.keys()
            assert all(torch.equal(u[k], v[k]) and u[k].dtype == v[k].dtype for k in u)
        else:
            assert u == v
    return True


@pytest.mark.parametrize("kind", ["pairs", "tokens", "gradients"])
@pytest.mark.parametrize("uids", [False, True])
def test_resident_rows_give_the_same_batches(tmp_path, kind, uids):
    g = torch.Generator().manual_seed(0)
    x = {m: torch.randn(300, 6, generator=g) for m in ("image", "text")}
    more = {"items": {m: torch.arange(300) // 3 for m in x}} if kind == "tokens" else {}
    more |= {"grad": {m: v.flip(0) for m, v in x.items()}} if kind == "gradients" else {}
    store = ActivationStore(write_store(tmp_path / "s", x, dtype="bfloat16", rows_per_shard=70, **more))
    for rank, world in ((0, 1), (1, 2)):
        kw = {"rank": rank, "world": world, "block": 16, "window": 2, "uids": uids, "split": (0.2, 1.0)}
        a, b = StoreLoader(store, 16, **kw), resident(StoreLoader(store, 16, **kw))
        for _ in range(2):  # epochs
            assert len(list(zip(a, b, strict=True))) == len(a) and all(map(same, a, b))
        assert a.state_dict() == b.state_dict()
        for _, batch in zip(range(5), b, strict=False):
            last = batch
        again = StoreLoader(store, 16, **kw)
        again.load_state_dict(b.state_dict())
        rest = list(again)
        assert len(rest) == len(b) - 5 and not torch.equal(rest[0].x["image"], last.x["image"])
        resumed = resident(StoreLoader(store, 16, **kw))
        resumed.load_state_dict(b.state_dict())
        assert all(map(same, rest, resumed))
        kw["shuffle"] = False
        kw["uids"] = None
        assert all(map(same, StoreLoader(store, 16, **kw), resident(StoreLoader(store, 16, **kw))))


def test_resident_rows_stay_as_they_are_stored_and_are_counted(tmp_path):
    x = {"image": torch.randn(100, 8), "text": torch.randn(100, 8)}
    store = ActivationStore(write_store(tmp_path / "s", x, dtype="float16"))
    rows = ResidentRows(store, {"text": "text"}, "cpu")
    assert rows.x["text"].dtype == torch.float16 and resident_bytes(store, {"text": "text"}) == rows.nbytes == 1600
    items = {m: torch.arange(100) // 2 for m in x}
    tokens = ActivationStore(write_store(tmp_path / "t", x, dtype="float16", items=items))
    assert resident_bytes(tokens, {"text": "text"}) == ResidentRows(tokens, {"text": "text"}, "cpu").nbytes == 2400


def test_rows_that_are_not_finite_are_refused_where_they_are_moved(tmp_path, monkeypatch):
    x = torch.randn(100, 8)
    x[70, 3] = torch.inf
    store = ActivationStore(write_store(tmp_path / "s", {"image": x}, rows_per_shard=40))
    monkeypatch.setattr(
        "mmsae.activations.loader.AUTO_VERIFY_BYTES", 0
    )  # as with a large store, which is not looked at
    loader = StoreLoader(store, 8)
    with pytest.raises(InputError, match="1 of 100 image rows"):
        resident(loader)


def test_what_decides_whether_rows_move(store, monkeypatch):
    names, cpu, gpu = store.spec.choose(), torch.device("cpu"), torch.device("cuda", 0)
    assert make_resident(store, names, cpu) == make_resident(store, names, gpu, False) == (None, "")
    rows, said = make_resident(store, names, cpu, True)
    assert rows.x["image"].shape == (N, 1) and "take 8.0 kB on cpu: moved there once (data.resident false" in said
    monkeypatch.setattr(resident_module, "free_bytes", lambda device: 10_000)
    none, said = make_resident(store, names, gpu)
    assert none is None and "take 8.0 kB on cuda:0, 80% of the 10.0 kB that are free there, and may take 50%" in said

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(resident_module, "ResidentRows", full)
    monkeypatch.setattr(resident_module, "free_bytes", lambda device: 10**6)
    none, said = make_resident(store, names, gpu)
    assert none is None and "which it could not give: they stay on disk" in said
    with pytest.raises(InputError, match=r"which it could not give: use data\.resident false"):
        make_resident(store, names, gpu, True)


# Other numbers of ranks


def epochs_on(store, world, total, n=3, **kw):
    """``[{modality: [batch of all ranks]}]`` of some epochs, and the loaders."""
    quotas = {m: size // world for m, size in total.items()}
    loaders = [StoreLoader(store, rank=r, world=world, quotas=quotas, **kw) for r in range(world)]
    return [together(loaders) for _ in range(n)], loaders


def together(loaders, stop=None):
    """Batches of all ranks, each the rows of its ranks one after the other, up to so many."""
    out = []
    for parts in zip(*loaders, strict=True):
        out.append({m: [tuple(r) for p in parts for r in p.x[m].tolist()] for m in parts[0].x})
        if len(out) == stop:
            break
    return out


@pytest.fixture(scope="module")
def token_store(tmp_path_factory):
    items = {m: torch.arange(60).repeat_interleave(k) for m, k in (("image", 9), ("text", 3))}
    x = {m: torch.stack([i, torch.arange(len(i))], 1).float() for m, i in items.items()}
    return ActivationStore(write_store(tmp_path_factory.mktemp("t") / "s", x, items=items, rows_per_shard=30))


KINDS = {"pairs": ("store", {"image": 24, "text": 24}), "tokens": ("token_store", {"image": 36, "text": 12})}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_all_ranks_do_not_depend_on_their_number(kind, request):
    store, total = request.getfixturevalue(KINDS[kind][0]), KINDS[kind][1]
    kw = {"block": 16, "window": 6, "split": (0.1, 1), "seed": 3}
    want, _ = epochs_on(store, 1, total, **kw)
    assert len({str(e) for e in want}) == 3 and len(want[0]) > 10
    for world in (2, 3, 4, 6, 12):
        assert epochs_on(store, world, total, **kw)[0] == want
    for epoch in want:
        for m in total:
            rows = [r for b in epoch for r in b[m]]
            assert len(set(rows)) == len(rows) == len(epoch) * total[m]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("worlds", [(2, 1, 2), (4, 2, 1, 3), (1, 12, 6), (8, 3, 8)])
def test_any_number_of_ranks_goes_on(kind, worlds, request):
    """Stopped at step 0, in the middle of an epoch, at its end and in the next one; resumed twice from one state."""
    store, total = request.getfixturevalue(KINDS[kind][0]), {"pairs": 48, "tokens": 24}[kind]
    total = {"image": total, "text": total}
    kw = {"block": 16, "window": 6, "seed": 1}
    want = [b for epoch in epochs_on(store, 1, total, n=4, **kw)[0] for b in epoch]
    n = len(StoreLoader(store, quotas=total, **kw))
    done, state, got = 0, None, []
    for world, steps in zip(worlds, (0, n // 2, n - n // 2, n + 3), strict=False):
        for _ in range(2):
            loaders = epochs_on(store, world, total, n=0, **kw)[1]
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(state)
            fresh = []
            while len(fresh) < steps:
                fresh += together(loaders, steps - len(fresh))
            assert fresh == want[done : done + steps]
        states = [loader.state_dict() for loader in loaders]
        assert all(s == states[0] for s in states) and states[0]["epoch"] * n + states[0]["batch"] == done + steps
        done, state, got = done + steps, states[0], got + fresh
    assert got == want[:done]


#: Of the first two epochs of rows and ranks, written by the version whose ranks had parts of an epoch for themselves.
EARLIER = {
    "pairs": {1: ["c63fb127b3ed7c49"], 2: ["e7ff0534771a38e7", "f77e0efba3bf9125"],
              3: ["45825ca0e1d01d1a", "e3769a65b42b8f9f", "6a0dec21d2abc429"]},
    "tokens": {1: ["101c9b8d6b1a2994"], 2: ["d2ea069d7cbcf740", "2561a3203e3c4b21"],
               3: ["3d80bf86b12fe437", "32c8c02997b7cd1a", "634f9b0077c27bdc"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", EARLIER)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_states_of_earlier_versions_go_on_in_their_order(kind, world, store, tmp_path):
    import hashlib

    if kind == "tokens":
        items = {m: torch.arange(100).repeat_interleave(k) for m, k in (("image", 9), ("text", 3))}
        x = {m: torch.stack([i, torch.arange(len(i))], 1).float() for m, i in items.items()}
        store = ActivationStore(write_store(tmp_path / "s", x, items=items, rows_per_shard=30))

    def loaders(world, **size):
        made = [StoreLoader(store, rank=r, world=world, block=16, window=4, seed=5, **size) for r in range(world)]
        for loader in made:
            loader.load_state_dict(state)
        return made

    now = StoreLoader(store, 17, world=world, block=16, window=4, seed=5)
    order = {k: v for k, v in now.state_dict()["order"].items() if k not in ("rows", "lanes")}
    state = {"epoch": 0, "batch": 0, "order": {**order, "sizes": now.sizes, "world": world}}
    read = [[[b.x[m][:, -1].int().tolist() for b in one for m in b.x] for _ in range(2)]
            for one in loaders(world, batch_size=17)]  # fmt: skip
    assert [hashlib.blake2b(repr(x).encode(), digest_size=8).hexdigest() for x in read] == EARLIER[kind][world]
    # and on any other number of ranks that shares those batches
    want = together(loaders(world, batch_size=17))
    assert together(loaders(1, quotas=now.total)) == want
    if kind == "pairs" and world == 2:
        assert together(loaders(17, quotas={m: n // 17 for m, n in now.total.items()})) == want
