"""Unwrapping, ports and shadows on toy modules."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmsae.hosts.hooks import EncodeShadow, ModulePort, ProjectionShadow, ShadowPort, rewrap, unwrap
from mmsae.types import InputError


class Named(NamedTuple):
    mask: object
    x: torch.Tensor


X, NEW = torch.zeros(2, 3), torch.ones(2, 3)
CONTAINERS = [
    X,
    (X, None, X + 5),
    [X, "y"],
    Named(None, X),
    {"sample": X, "other": X + 5},
    BaseModelOutputWithPooling(last_hidden_state=X, pooler_output=X + 5),
]


@pytest.mark.parametrize("output", CONTAINERS, ids=lambda o: type(o).__name__)
def test_unwrap_finds_x_and_rewrap_replaces_only_it(output):
    assert unwrap(output) is X
    assert rewrap(output, X) is output
    new = rewrap(output, NEW)
    assert type(new) is type(output) and unwrap(new) is NEW and unwrap(output) is X
    if isinstance(output, BaseModelOutputWithPooling):
        assert new.pooler_output is output.pooler_output
    elif isinstance(output, (tuple, list)):
        assert [a is b for a, b in zip(new, output, strict=True)].count(False) == 1


def test_output_without_a_tensor_is_refused():
    with pytest.raises(InputError, match="tuple"):
        unwrap((None, "x"))


class Block(nn.Module):
    """A block as transformers 4 has it: keyword input, tuple output; ``inplace`` overwrites its input."""

    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, scale=2.0, hidden_states=None):
        out = hidden_states.mul_(scale) if self.inplace else hidden_states * scale
        return out, "cache"


def test_in_out_update_of_a_module_with_keyword_input_and_tuple_output():
    block, x = Block(), torch.tensor([1.0, 2.0])
    seen = {}
    for io in ("in", "out", "update"):
        with ModulePort(block, io).attach(lambda t, io=io: seen.setdefault(io, t)):
            block(hidden_states=x)
    assert seen["in"] is x and seen["out"].tolist() == [2, 4] and seen["update"].tolist() == [1, 2]
    with ModulePort(block, "in").attach(lambda t: t + 1):
        assert block(hidden_states=x)[0].tolist() == [4, 6]
    with ModulePort(block, "update").attach(lambda t: t * 10):
        out, cache = block(hidden_states=x)
        assert out.tolist() == [11, 22] and cache == "cache"


def test_update_of_a_module_that_works_in_place():
    seen = []
    with ModulePort(Block(inplace=True), "update").attach(lambda t: seen.append(t) or t) as _:
        pass
    block = Block(inplace=True)
    with ModulePort(block, "update").attach(lambda t: seen.append(t) or t):
        block(hidden_states=torch.tensor([1.0, 2.0]))
    assert seen[0].tolist() == [1, 2]


def test_same_object_leaves_the_hosts_own_object():
    made = (X.clone(), None)

    class Constant(nn.Module):
        def forward(self, x):
            return made

    module = Constant()
    with ModulePort(module).attach(lambda t: t), ModulePort(module, "in").attach(lambda t: t):
        assert module(X) is made


def test_later_functions_see_what_earlier_ones_returned():
    module, seen = nn.Identity(), []
    with ModulePort(module).attach(lambda t: t + 1), ModulePort(module).attach(lambda t: seen.append(t) or t):
        module(X)
    assert torch.equal(seen[0], X + 1)


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Parameter(torch.randn(3, 4))

    def encode(self, x, normalize=False):
        x = x @ self.proj
        return nn.functional.normalize(x, dim=-1) if normalize else x


def test_shadows_reach_a_bare_parameter_and_a_method_and_vanish_in_any_order():
    host, x = Projected(), torch.randn(5, 3)
    keys, plain, proj = list(host.state_dict()), host.encode(x), host.proj
    pooled = ShadowPort(host, "proj", ProjectionShadow)
    embed = ShadowPort(host, "encode", EncodeShadow)
    first, second = pooled.attach(lambda t: t + 1), pooled.attach(lambda t: t * 2)
    first.__enter__(), second.__enter__()
    assert list(host.state_dict()) == keys
    torch.testing.assert_close(host.encode(x), (x + 1) * 2 @ proj)
    first.__exit__(None, None, None)
    torch.testing.assert_close(host.encode(x), x * 2 @ proj)
    second.__exit__(None, None, None)
    assert host.proj is proj and torch.equal(host.encode(x), plain)
    with embed.attach(lambda t: t + 1):
        torch.testing.assert_close(host.encode(x), plain + 1)
        torch.testing.assert_close(host.encode(x, normalize=True), nn.functional.normalize(plain + 1, dim=-1))
    assert "encode" not in host.__dict__ and torch.equal(host.encode(x), plain)


def test_everything_is_gone_after_an_exception():
    host, block = Projected(), Block()

    def broken(t):
        raise KeyError("edit")

    with pytest.raises(KeyError), ShadowPort(host, "proj", ProjectionShadow).attach(broken):
        host.encode(X)
    assert isinstance(host.proj, nn.Parameter) and "proj" not in host.__dict__
    for io in ("in", "out", "update"):
        with pytest.raises(KeyError), ModulePort(block, io).attach(broken):
            block(hidden_states=X)
    assert not block._forward_hooks and not block._forward_pre_hooks
