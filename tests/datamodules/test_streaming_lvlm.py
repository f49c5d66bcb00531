"""A vision-language host behind the datamodules and the store: nobody there knows that it is one."""

import io
from types import SimpleNamespace

import pytest
import torch

from datamodules import CachedActivations, StreamingActivations
from mmsae.activations import ActivationStore, MixingBuffer, extract
from mmsae.hosts import load_host
from mmsae.sae import SAE, TopK
from mmsae.shards import ShardWriter
from mmsae.training.lit import LitSAE
from mmsae.types import ROLES, InputError, Tokens
from tests.helpers.lvlm import llava, picture
from tests.helpers.training import ROOT, mmsae

SEPARATE, SHARED = ({"packing": how, "max_tokens": 96} for how in ("separate", "shared"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A host's name, and shards of 24 pairs."""
    root = tmp_path_factory.mktemp("lvlm")
    words = "a red circle left of a blue square".split()
    with ShardWriter(root / "shards", "s", per_shard=12) as w:
        for i in range(24):
            png = io.BytesIO()
            picture(i).save(png, "PNG")
            w.write(f"k{i}", {"png": png.getvalue(), "txt": " ".join(words[: 2 + i % 6])})
    return llava(root / "host"), str(root / "shards")


def test_streaming_mixes_both_kinds_of_tokens_and_holds_no_special_ones(world):
    host, shards = world
    data = StreamingActivations(
        shards, host, sites={m: f"layers.1:out[{m}]" for m in ("image", "text")}, batch_size=16, val_shards=shards,
        quotas={"image": 24, "text": 8}, buffer_pairs=64, read_batch=4, epoch_batches=6, workers=0,
    )  # fmt: skip
    assert data.d_in == 32 and data.modalities == ("image", "text")
    batches = list(data.train_dataloader())
    assert len(batches) == 6
    assert all({m: len(x) for m, x in b.x.items()} == {"image": 24, "text": 8} for b in batches)
    held = load_host(host)
    every = [t for t in data.val_dataloader()]
    assert sum(len(t.x["image"]) for t in every) == 24 * 9
    assert not any(t.special["text"].any() for t in every)
    bos = held.read(next(iter(data._pipeline(shards, None))), ["layers.1:out[text_all]"])[0]
    bos = bos.x[bos.position == 0]
    seen = torch.cat([b.x["text"] for b in batches])
    assert torch.cdist(seen, bos).min() > 1e-3
    default = StreamingActivations(shards, host, workers=0)
    default.setup()
    assert {s.tokens for s in default.sites.values()} == {"image", "text"}


def test_extract_stores_means_as_pairs(world, tmp_path):
    host, shards = world
    sites = ["layers.2:in[image_mean]", "layers.2:in[text_mean]"]
    store = ActivationStore(extract(host, shards, tmp_path / "store", sites=sites, batch_size=5, workers=0,
                                    device="cpu", progress=False))  # fmt: skip
    assert len(store) == 24 and list(store.modalities) == ["image", "text"] and store.d_in == 32
    held = load_host(host)
    assert {m: str(s.tokens) for m, s in store.sites.items()} == {"image": "image_mean", "text": "text_mean"}
    assert all(s.same(held.site(s)) for s in store.sites.values())


def test_equal_numbers_of_rows_are_no_pairs():
    def tokens(items):
        item = torch.tensor(items)
        return Tokens({m: torch.randn(len(item), 3) for m in ("image", "text")}, {"image": item, "text": item})

    uneven = tokens([0, 0, 1])._replace(item={"image": torch.tensor([0, 0, 1]), "text": torch.tensor([0, 1, 1])})
    out = list(MixingBuffer(12, 2).mix([uneven, tokens([0, 0, 1, 1]), uneven]))
    assert sum(len(t.x["image"]) for t in out) == 10


def test_conversations_have_their_answers(world, tmp_path):
    host, _ = world
    png = io.BytesIO()
    picture(0).save(png, "PNG")
    meta = {"question": "a red circle", "answer": "left of a blue square"}
    with ShardWriter(tmp_path, "c", per_shard=4) as w:
        w.write("k0", {"png": png.getvalue(), "txt": "a", "json": meta})
    rows = {}
    for text in ("question", "question+answer"):
        data = StreamingActivations(
            str(tmp_path), host, val_shards=str(tmp_path), batch_size=1, workers=0, text=text,
            sites={m: f"layers.1:out[{m}]" for m in ("image", "text")},
        )  # fmt: skip
        (tokens,) = list(data.val_dataloader())
        rows[text] = {m: len(x) for m, x in tokens.x.items()}
    assert rows == {"question": {"image": 9, "text": 3}, "question+answer": {"image": 9, "text": 8}}
    store = ActivationStore(extract(host, str(tmp_path), tmp_path / "store", text="question+answer", workers=0,
                                    device="cpu", progress=False))  # fmt: skip
    assert {m: len(store.load(modality=m)) for m in store.modalities} == rows["question+answer"]
    cached = CachedActivations(str(tmp_path / "store"), 4, 0, quotas={"image": 4, "text": 3})
    cached.setup()
    assert {m: len(x) for m, x in next(iter(cached.train_dataloader())).x.items()} == {"image": 4, "text": 3}
    model = LitSAE(SAE(32, 48, selector=TopK(4)))
    model.sae.fit_normaliser({m: torch.randn(64, 32) for m in ("image", "text")})
    model.validation_step(tokens, 0)
    report = model.validation.compute()
    assert {"fvu/image", "fvu/text", "l0/text", "dead/text", "dead/image"} <= set(report)
    assert not any(k.startswith("code_cosine") for k in report)


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Shards of 16 conversations."""
    folder = tmp_path_factory.mktemp("talk")
    words = "a red circle left of a blue square".split()
    with ShardWriter(folder, "c", per_shard=8) as w:
        for i in range(16):
            png = io.BytesIO()
            picture(i).save(png, "PNG")
            meta = {"question": "is there " + " ".join(words[: 1 + i % 8]), "answer": ("yes", "no")[i % 2]}
            w.write(f"k{i}", {"png": png.getvalue(), "txt": "a", "json": meta})
    return str(folder)


def conversations(host, shards, **more):
    options = {"batch_size": 16, "buffer_pairs": 128, "read_batch": 4, "workers": 0, "epoch_batches": 8, "shuffle": 1}
    options |= {"sites": {"text": "layers.1:out[all]"}, "text": "question+answer", "val_shards": shards}
    return StreamingActivations(shards, host, **options | more)


def test_conversations_stay_whole_with_their_flags_and_padding_never_comes(world, talk):
    data = conversations(world[0], talk, refill_at_half=True)
    batches = list(data.train_dataloader())
    every = list(data.val_dataloader())
    x, role = (torch.cat([getattr(t, c)["text"] for t in every]) for c in ("x", "role"))
    known = {tuple(row): int(r) for row, r in zip(x.mul(1e4).round().int().tolist(), role, strict=True)}
    assert {ROLES[r] for r in known.values()} == {"special", "template", "question", "answer", "image"}
    for b in batches:
        assert torch.equal(b.special["text"], (b.role["text"] == 1) | (b.role["text"] == 2))
        near = torch.cdist(b.x["text"], x, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert near.values.max() < 1e-3 and torch.equal(b.role["text"], role[near.indices])
    again = list(conversations(world[0], talk, refill_at_half=True).train_dataloader())
    assert all(torch.equal(a.x["text"], b.x["text"]) for a, b in zip(batches, again, strict=True))


def test_a_conversation_is_the_same_in_any_company_unless_it_is_packed_and_sees_it(world, talk):
    def rows(**more):
        found = {}
        for t in conversations(world[0], talk, **more).val_dataloader():
            for i, uid in enumerate(t.uids):
                own = t.item["text"] == i
                found[uid] = t.x["text"][own][t.position["text"][own].argsort()]
        return found

    one, four, separate, shared = (rows(**o) for o in ({"read_batch": 1}, {}, SEPARATE, SHARED))
    assert len(one) == 16 and one.keys() == four.keys() == separate.keys() == shared.keys()
    for other in (four, separate):
        assert all(torch.allclose(one[u], other[u], atol=1e-5) for u in one)
    assert sum(not torch.allclose(one[u], shared[u], atol=1e-3) for u in one) >= 4
    short = rows(max_tokens=18)
    assert max(map(len, short.values())) <= 18 < max(map(len, one.values()))


def test_packing_needs_conversations(world):
    data = StreamingActivations(world[1], world[0], packing="separate")
    with pytest.raises(InputError, match="packing separate, but host x reads captions"):
        data.conversations.collate(SimpleNamespace(hint="x"), None)


def test_a_fit_in_the_manner_of_fast_says_the_error_of_every_flag(world, talk, tmp_path):
    done = mmsae(
        "fit", "--data.shards", talk, "--data.val_shards", talk, "--data.host", world[0], "--data.d_in", "32",
        "--data.sites", "{text: 'layers.1:out[all]'}", "--data.workers", "0", "--data.buffer_pairs", "256",
        "--data.precision", "fp32", "--model.sae.init_args.ratio", "2", "--trainer.max_steps", "6",
        "--data.max_tokens", "64", "--data.shuffle", "1",
        "--trainer.val_check_interval", "3", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", tmp_path,
        "--trainer.enable_progress_bar", "false", "--trainer.num_sanity_val_steps", "0",
        "--trainer.log_every_n_steps", "1", recipe=str(ROOT / "configs" / "train" / "fast_llava.yaml"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = tmp_path.rglob("metrics.csv")
    head = log.read_text().splitlines()[0].split(",")
    assert {"val/mse/special", *(f"val/mse/role/{r}" for r in ("template", "question", "answer", "image"))} <= set(head)
    assert (tmp_path / "sae" / "cfg.json").is_file()
