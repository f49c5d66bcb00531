"""Layouts, token policies and fingerprints."""

import pytest
import torch

from mmsae.fingerprint import fingerprint
from mmsae.hosts.tokens import (
    Layout,
    Marks,
    check_policy,
    find_layout,
    from_tokens,
    keep_mask,
    put,
    take,
    to_tokens,
)
from mmsae.types import InputError


@pytest.mark.parametrize(
    "one,channels_last,layout",
    [
        ((1, 8), False, Layout(2, 0, 1, 8)),
        ((1, 5, 8), False, Layout(3, 0, 2, 8)),
        ((5, 1, 8), False, Layout(3, 1, 2, 8)),
        ((1, 1, 8), False, Layout(3, 0, 2, 8)),
        ((1, 8, 3, 3), False, Layout(4, 0, 1, 8)),
        ((1, 8, 3, 3), True, Layout(4, 0, 1, 8)),  # an NCHW layer of an NHWC host
        ((1, 3, 3, 8), False, Layout(4, 0, 3, 8)),
        ((1, 3, 3, 3), False, Layout(4, 0, 1, 3)),
        ((1, 3, 3, 3), True, Layout(4, 0, 3, 3)),
        ((1, 8, 1, 1), False, Layout(4, 0, 1, 8)),
        ((1, 2, 4, 8), True, Layout(4, 0, 3, 8)),
    ],
)
def test_layout_from_two_shapes_and_back_to_the_same_tensor(one, channels_last, layout):
    batch = 1 if one == (5, 1, 8) else 0
    two = torch.Size(2 if i == batch else n for i, n in enumerate(one))
    assert find_layout(torch.Size(one), two, channels_last, "s") == layout
    x = torch.randn(two)
    tokens = to_tokens(x, layout)
    assert tokens.shape == (2, x.numel() // 2 // layout.width, layout.width)
    assert torch.equal(from_tokens(tokens, x, layout), x)


def test_map_becomes_tokens_in_row_order():
    x = torch.arange(12.0).view(1, 2, 2, 3)  # (B, C, H, W)
    assert to_tokens(x, Layout(4, 0, 1, 2))[0].tolist() == [[i, 6 + i] for i in range(6)]


def test_strides_and_dtype_of_the_host_are_kept():
    x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last).bfloat16()
    back = from_tokens(to_tokens(x.float(), Layout(4, 0, 1, 8)), x, Layout(4, 0, 1, 8))
    assert back.dtype == torch.bfloat16 and back.stride() == x.stride() and torch.equal(back, x)


@pytest.mark.parametrize("one,two", [((4, 8), (8, 8)), ((1, 8), (1, 8)), ((1, 1, 8), (2, 2, 8)), ((1,), (2,))])
def test_shapes_without_one_batch_axis_are_refused(one, two):
    with pytest.raises(InputError, match="cannot be a site"):
        find_layout(torch.Size(one), torch.Size(two), False, "s")


def marks():
    content = torch.tensor([[True, True, False], [True, True, True]])
    return Marks(content, ~content, 0, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "policy,rows",
    [
        ("all", [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]),
        ("mask", [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]),
        ("patches", [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]),
        ("eos", [(0, 1), (1, 2)]),
        ("cls", [(0, 0), (1, 0)]),
    ],
)
def test_take_and_put_touch_just_the_kept_rows(policy, rows):
    x = torch.randn(2, 3, 4)
    keep = keep_mask(policy, marks())
    assert keep.nonzero().tolist() == [list(r) for r in rows]
    old = take(x, keep, False)
    want = x.clone()
    for i, (b, t) in enumerate(rows):
        want[b, t] = old[i] * 2
    assert torch.equal(put(x, keep, False, old, old * 2), want)


def test_pooled_is_the_mean_and_an_edit_moves_every_averaged_token():
    x = torch.randn(2, 3, 4)
    keep = keep_mask("pooled", marks())
    mean = take(x, keep, True)
    torch.testing.assert_close(mean[0], x[0, :2].mean(0))
    new = put(x, keep, True, mean, mean + 1)
    torch.testing.assert_close(take(new, keep, True), mean + 1)
    assert torch.equal(new[0, 2], x[0, 2])
    torch.testing.assert_close(new[0, :2], x[0, :2] + 1)


@pytest.mark.parametrize(
    "policy,ndim,modality,cls,why",
    [
        ("first", 3, "text", True, "not one of"),
        ("all", 2, "image", True, "one row per item"),
        ("eos", 3, "image", True, "is for text"),
        ("mask", 4, "image", True, "is for text"),
        ("patches", 3, "text", True, "is for images"),
        ("cls", 3, "image", False, "class token"),
        ("cls", 4, "image", True, "class token"),
    ],
)
def test_policies_that_a_site_cannot_have(policy, ndim, modality, cls, why):
    with pytest.raises(InputError, match=why):
        check_policy(policy, Layout(ndim, 0, ndim - 1, 8), modality, cls, "s")


def test_fingerprint_sees_every_bit_name_shape_dtype_and_config_value():
    state = {"a": torch.randn(3, 4), "b": torch.tensor(1.0), "c": torch.zeros(0, 2)}
    base = fingerprint({"x": (1, 2), "y": 0.5}, state)
    assert len(base) == 32
    assert fingerprint({"y": 0.5, "x": [1, 2]}, dict(reversed(state.items()))) == base
    assert fingerprint({"x": (1, 2), "y": 0.5}, {**state, "a": state["a"].t().contiguous().t()}) == base
    one_bit = state["a"].clone()
    one_bit.view(torch.int32)[0, 0] ^= 1
    for config, other in (
        ({"x": (1, 2), "y": 0.25}, state),
        ({"x": (1, 2), "y": 0.5}, {**state, "a": one_bit}),
        ({"x": (1, 2), "y": 0.5}, {**state, "a": state["a"].view(4, 3)}),
        ({"x": (1, 2), "y": 0.5}, {**state, "a": state["a"].view(torch.int32)}),
        ({"x": (1, 2), "y": 0.5}, {"z": state["a"], "b": state["b"], "c": state["c"]}),
    ):
        assert fingerprint(config, other) != base
