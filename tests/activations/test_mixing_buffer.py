"""MixingBuffer: every row once, pairs together, bounded memory, rows of one source spread out."""

import pytest
import torch

from mmsae.activations import MixingBuffer
from mmsae.activations.mixing_buffer import mix_side_by_side
from mmsae.types import InputError, SideBySide, Tokens


def pairs(n, size=20, seed=None):
    """A stream of paired batches; image row i is i, text row i is -i."""
    for lo in range(0, n, size):
        rows = torch.arange(lo, min(lo + size, n)).float()[:, None]
        yield Tokens.pooled({"image": rows, "text": -rows})


def ids(batches):
    return [b.x["image"][:, 0].int().tolist() for b in batches]


@pytest.mark.parametrize(
    ("capacity", "batch", "size"), [(100, 10, 20), (30, 30, 20), (25, 10, 90), (1, 1, 7), (500, 16, 20)]
)
def test_every_pair_once_and_together(capacity, batch, size):
    buffer = MixingBuffer(capacity, batch)
    seen = []
    for b in buffer.mix(pairs(333, size)):
        assert torch.equal(b.x["text"], -b.x["image"]) and b.paired()
        assert len(buffer) <= capacity
        seen.append(b.x["image"][:, 0].int().tolist())
    assert sorted(sum(seen[1:], seen[0])) == list(range(333))
    assert {len(s) for s in seen[:-1]} <= {batch} and len(seen[-1]) <= batch


def test_without_draining_all_batches_are_full():
    seen = ids(MixingBuffer(50, 10).mix(pairs(333), drain=False))
    assert {len(s) for s in seen} == {10} and len(seen) == (333 - 50) // 10 + 1


def test_the_seed_decides_the_order():
    a, b, c = (ids(MixingBuffer(50, 10, seed).mix(pairs(200))) for seed in (1, 1, 2))
    assert a == b != c
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ids(MixingBuffer(50, 10, 1).mix(pairs(200)))
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_wait_until_the_buffer_is_full_and_then_come_from_all_of_it():
    came = []

    def stream():
        for t in pairs(2000, 20):
            came.append(len(t.x["image"]))
            yield t

    batches = MixingBuffer(400, 40).mix(stream())
    first = next(batches)
    assert 400 <= sum(came) <= 420
    spread = [first, *(next(batches) for _ in range(20))]
    # 40 rows out of 400, of sources of 20 rows: about 17.6 of 20 sources in a batch; 12 is 5 deviations below
    assert min(len(set((b.x["image"][:, 0] // 20).int().tolist())) for b in spread) >= 12


def test_capacity_does_not_change_with_the_stream():
    buffer = MixingBuffer(64, 8)
    for _ in buffer.mix(pairs(1000, 50)):
        assert all(v.shape[0] == 64 for p in buffer._pools.values() for v in p.rows.values())


def test_token_sites_have_quotas():
    def stream():
        for i in range(50):
            x = {"image": torch.full((40, 2), float(i)), "text": torch.full((9, 3), float(i))}
            yield Tokens(x, {m: torch.zeros(len(v), dtype=torch.long) for m, v in x.items()})

    buffer = MixingBuffer(100, 8, quotas={"image": 16, "text": 4})
    batches = list(buffer.mix(stream(), drain=False))
    assert {(len(b.x["image"]), len(b.x["text"])) for b in batches} == {(16, 4)}
    assert 100 <= len(batches) <= 112  # 450 rows of text are 112 quotas, and some stay in the buffer
    last = torch.cat([b.x["image"] for b in batches[-20:]])
    assert last.max() >= 45 and last.shape[1] == 2  # it is not that the first images fill the buffer for good


def test_one_modality():
    stream = (Tokens.pooled({"image": torch.arange(20.0)[:, None] + i}) for i in range(0, 200, 20))
    assert sorted(sum(ids(MixingBuffer(50, 10).mix(stream)), [])) == list(range(200))  # noqa: RUF017


def test_wrong_input():
    with pytest.raises(InputError, match="capacity is 10, a batch of 20"):
        MixingBuffer(10, 20)
    unpaired = Tokens(
        {"image": torch.ones(4, 1), "text": torch.ones(2, 1)}, {"image": torch.zeros(4), "text": torch.zeros(2)}
    )
    with pytest.raises(InputError, match="pairs turned into"):
        list(MixingBuffer(10, 2).mix([*pairs(20), unpaired]))


def test_gradients_stay_with_their_rows():
    def stream(tokens):
        for t in pairs(60):
            x = {m: v.clone() for m, v in t.x.items()}
            if tokens:
                x["text"] = x["text"][:7]
            item = {m: torch.arange(len(v)) for m, v in x.items()}
            yield Tokens(x, item, grad={"image": 10 * x["image"].expand(-1, 3)})

    for tokens in (False, True):
        seen = list(MixingBuffer(30, 5).mix(stream(tokens)))
        assert all(torch.equal(b.grad["image"], 10 * b.x["image"].expand(-1, 3)) for b in seen)
        assert all(set(b.grad) == {"image"} for b in seen)


def test_half_of_the_buffer_is_given_and_filled_again():
    came, given = 0, []

    def stream():
        nonlocal came
        for t in pairs(1000, 25):
            came += len(t.x["image"])
            given.append(0)
            yield t

    buffer, seen = MixingBuffer(100, 10, 3, half=True), []
    for b in buffer.mix(stream(), drain=False):
        given[-1] += 10
        seen += b.x["image"][:, 0].int().tolist()
        assert len(b.x["image"]) == 10 and torch.equal(b.x["text"], -b.x["image"])
    assert given[:9] == [0, 0, 0, 0, 50, 0, 50, 0, 50] and set(given) == {0, 50}
    assert len(set(seen)) == len(seen) and len(seen) + len(buffer) == came == 1000
    again = ids(MixingBuffer(100, 10, 3, half=True).mix(pairs(1000, 25), drain=False))
    assert sum(again, []) == seen  # noqa: RUF017
    whole = ids(MixingBuffer(100, 10, 3, half=True).mix(pairs(1000, 25)))
    assert sorted(sum(whole, [])) == list(range(1000))  # noqa: RUF017


def test_buffers_side_by_side():
    """Each gives what it gives alone; sites with other numbers of rows are refused, for they need other batches."""
    g = torch.Generator().manual_seed(0)
    stream = [SideBySide({n: Tokens.pooled({"image": torch.randn(7, d, generator=g)}) for n, d in (("a", 3), ("b", 5))})
              for _ in range(9)]  # fmt: skip
    found = list(mix_side_by_side({n: MixingBuffer(20, 6, seed=2) for n in "ab"}, stream))
    for n in "ab":
        alone = MixingBuffer(20, 6, seed=2).mix([b.of[n] for b in stream], drain=False)
        assert all(torch.equal(a.of[n].x["image"], b.x["image"]) for a, b in zip(found, alone, strict=True))
    assert len(found) >= 6
    odd = SideBySide({"a": stream[0].of["a"], "b": Tokens.pooled({"image": torch.randn(21, 5)})})
    with pytest.raises(InputError, match="the sites a give 7 rows of a batch of the host, b give 21"):
        list(mix_side_by_side({n: MixingBuffer(20, 6) for n in "ab"}, [odd]))
