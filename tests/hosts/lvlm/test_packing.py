"""Blocks of conversations: nothing is lost, and with masks of their own nobody sees the one before."""

import pytest
import torch

from mmsae.hosts import load_host
from mmsae.hosts.lvlm.packing import Packer
from mmsae.types import ROLES, InputError
from tests.helpers import lvlm as made
from tests.helpers.lvlm import sample

SAID = [
    ("is there a red circle ?", "yes"),
    ("what shows the picture ?", "a blue square left of a green circle ."),
    ("is there a blue square ?", "no"),
    ("a red circle", "yes yes yes"),
]
SITES = {"image": "layers.1:out[image]", "text": "layers.1:out[text_all]"}


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def host(request, tmp_path_factory):
    return load_host(getattr(made, request.param)(tmp_path_factory.mktemp(request.param)))


def samples():
    pictures = ["one", "one", None, "one"]
    return [
        sample(i, "", p, {"question": q, "answer": a}) for i, ((q, a), p) in enumerate(zip(SAID, pictures, strict=True))
    ]


def rows_of(tokens, m, i):
    """Rows of a sample in the order of their places."""
    own = tokens.item[m] == i
    return tokens.x[m][own][tokens.position[m][own].argsort()]


def test_packed_conversations_are_those_of_their_own_sequences(host):
    collate = host.collator("question+answer")
    alone, several = host.capture(collate(samples()), SITES), samples()
    packed = host.packer(collate, separate=True)(several)
    assert len(packed.inputs["input_ids"]) < len(several) == len(packed.uids)
    tokens = host.capture(packed, SITES)
    for m in SITES:
        for i in range(len(several)):
            torch.testing.assert_close(rows_of(tokens, m, i), rows_of(alone, m, i), atol=1e-5, rtol=1e-4)
        for column in ("role", "special", "position"):
            counts = [getattr(t, column)[m].long().bincount() for t in (tokens, alone)]
            assert torch.equal(*counts)
    assert not any((r == ROLES.index("padding")).any() for r in tokens.role.values())
    last = host.capture(host.packer(collate, separate=True)(several[1:]), SITES)
    for i in range(1, len(several)):  # and whether or not another one comes before
        torch.testing.assert_close(rows_of(last, "text", i - 1), rows_of(tokens, "text", i), atol=1e-5, rtol=1e-4)


def test_without_masks_of_their_own_they_see_what_comes_before(host):
    collate = host.collator("question+answer")
    alone, packed = host.capture(collate(samples()), SITES), host.packer(collate, separate=False)(samples())
    tokens = host.capture(packed, SITES)
    assert torch.allclose(rows_of(tokens, "text", 0), rows_of(alone, "text", 0), atol=1e-5)
    first = packed.inputs["segments"][0].amax()
    assert first > 0 and (rows_of(tokens, "text", int(first)) - rows_of(alone, "text", int(first))).abs().max() > 1e-2


def test_gradients_of_packed_conversations_are_those_of_each(host):
    collate = host.collator("question+answer")
    alone = host.capture(collate(samples()), SITES, "lm")
    tokens = host.capture(host.packer(collate, separate=True)(samples()), SITES, "lm")
    for m in SITES:
        for i in range(len(SAID)):
            a, b = (rows_of(t._replace(x=t.grad), m, i) for t in (tokens, alone))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_blocks_have_an_end_and_long_conversations_one_of_their_own(host):
    collate = host.collator("question+answer")
    longest = int(collate(samples()).inputs["attention_mask"].sum(1).max())
    blocks = Packer(collate.limited(longest), False)(samples()).inputs["segments"]
    assert blocks.shape[1] <= longest and len(blocks) >= 2
    assert blocks[blocks >= 0].unique().tolist() == [0, 1, 2, 3]
    short = collate.limited(longest - 3)(samples())
    assert short.inputs["attention_mask"].sum(1).max() <= longest - 3 and short.faults.counts["long_caption"] >= 1
    with pytest.raises(InputError, match="max_tokens is 0"):
        collate.limited(0)


def test_sites_in_the_tower_belong_to_their_samples(host):
    collate = host.collator("question+answer")
    site = next(n for n, _ in host.model.named_modules() if n.endswith("layers.0") and "vision" in n)
    rows = [host.read(b, [site])[0] for b in (collate(samples()), host.packer(collate, True)(samples()))]
    assert torch.equal(rows[0].item, rows[1].item) and torch.allclose(rows[0].x, rows[1].x)


def test_what_cannot_be_packed_is_refused(host, tmp_path):
    packed = host.packer(host.collator(), True)(samples())
    with pytest.raises(InputError, match="mean over a conversation"):
        host.read(packed, ["layers.1:out[text_mean]"])
    qwen = load_host(made.qwen(tmp_path))
    with pytest.raises(InputError, match=r"cannot pack conversations: it finds the positions .* take packing none"):
        qwen.packer(qwen.collator(), False)
    text = host.model.config.get_text_config()
    text._attn_implementation, before = "flash_attention_2", text._attn_implementation
    try:
        with pytest.raises(InputError, match="takes no mask of blocks"):
            host.packer(host.collator(), True)
    finally:
        text._attn_implementation = before
