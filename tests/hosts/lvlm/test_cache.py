"""A generation's cache is found under any name and in each of its forms; calls that do not tell are refused."""

import pytest
import torch
from transformers import DynamicCache

from mmsae.hosts import load_host
from mmsae.hosts.lvlm.cache import cached, caches, is_cache
from mmsae.hosts.sites import Where
from mmsae.types import InputError
from tests.helpers import lvlm as made
from tests.helpers.lvlm import picture

IDS = torch.zeros(2, 1, dtype=torch.long)


def states(tokens, layers=2):
    return tuple((torch.zeros(2, 3, tokens, 4), torch.zeros(2, 3, tokens, 4)) for _ in range(layers))


def filled(tokens, layers=2):
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(states(tokens, layers) if tokens else ()):
        cache.update(keys, values, layer)
    return cache


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return load_host(made.llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture()
def batch(host):
    return host.collate.batch(["is there a red circle?", "what"], [picture(0), picture(1)])


@pytest.mark.parametrize("form", [filled, states])
@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params", "a_name_of_tomorrow"])
def test_a_cache_is_found_by_what_it_is(name, form):
    call = {"input_ids": IDS, name: form(7), "attention_mask": torch.ones(2, 8)}
    assert cached((), call) == 7 and [k for k, _ in caches((), call)] == [name]
    assert cached((IDS, None, form(5)), {}) == 5  # by place
    assert cached((), {"past_key_values": form(7), "cache": form(7)}) == 7


def test_without_a_cache_or_with_an_empty_one_it_is_a_prompt():
    ids = torch.zeros(2, 6, dtype=torch.long)
    for more in ({}, {"cache": None}, {"cache": filled(0)}, {"use_cache": True, "cache_position": torch.arange(6)}):
        assert cached((), {"input_ids": ids, "attention_mask": torch.ones(2, 6), **more}, prompt=6) == 0
    assert cached((), {"input_ids": IDS, "cache": filled(0)}, prompt=6) == 0  # the first piece of a prompt


@pytest.mark.parametrize(
    "value", [(), IDS, (IDS, IDS), [torch.zeros(1, 1, 1, 1)] * 2, {"a": filled(1)}, ((IDS, IDS),), "static", 3]
)
def test_what_is_no_cache(value):
    assert not is_cache(value)


class Foreign:
    """A cache that nobody here knows."""


class Recurrent(DynamicCache):
    """One that counts no tokens."""

    def get_seq_length(self, *args):
        raise ValueError("only recurrent layers")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"attention_mask": torch.ones(2, 8)}, "no cache although its mask covers 8 tokens and it holds 1"),
        ({"cache_position": torch.tensor([7])}, "no cache although its cache_position begins at 7"),
        ({"past_states": Foreign()}, "its past_states is of a kind that is not known here, Foreign"),
        ({"past_key_values": filled(3), "cache": states(4)}, "unequal lengths: past_key_values 3, cache 4"),
        ({"cache": Recurrent()}, "its Recurrent does not count tokens .only recurrent layers."),
        ({}, "no cache although the prompt has 6 tokens and it holds 1"),
    ],
)
def test_a_call_that_does_not_tell_is_refused(call, message):
    with pytest.raises(InputError, match=f"does not tell whether it reads the prompt or goes on.*{message}"):
        cached((), {"input_ids": IDS, **call}, prompt=6)


@pytest.mark.parametrize("tokens", ["text", "all", "image_mean"])
def test_an_edit_does_not_act_on_the_prompt_alone(host, batch, tokens):
    """Where the cache is out of reach, generation stops at the first step that it cannot place."""
    calls, inner = [], host.model.prepare_inputs_for_generation

    def renamed(*args, **kwargs):
        given = inner(*args, **kwargs)
        for k in [k for k, v in given.items() if is_cache(v)]:
            given["past_hidden"] = Foreign()
            given["past_hidden"].cache = given.pop(k)
        return given

    host.model.prepare_inputs_for_generation = renamed
    try:
        with host.edit(f"layers.1:out[{tokens}]", lambda x: calls.append(x) or x):
            with pytest.raises(InputError, match="past_hidden is of a kind that is not known here, Foreign"):
                host.generate(batch, max_new_tokens=3)
    finally:
        host.model.prepare_inputs_for_generation = inner
    assert not calls


def test_a_generation_tells_its_length_at_each_step(host, batch):
    n, starts = batch.inputs["input_ids"].shape[1], []
    with host.watch(seen := []):
        hook = host.model.register_forward_hook(lambda *_: starts.append(seen[0][2]))
        host.generate(batch, max_new_tokens=4, eos_token_id=None, do_sample=False)
        host.generate(batch, max_new_tokens=2, eos_token_id=None, do_sample=False, use_cache=False)
        hook.remove()
    assert starts == [0, n, n + 1, n + 2, 0, 0]


def test_a_mean_over_tokens_that_were_not_seen_is_refused(host, batch):
    given = {k: v for k, v in batch.inputs.items() if k in host._accepted}
    with torch.no_grad():
        out = host.model(**given, use_cache=True)
    ((name, cache),) = ((k, v) for k, v in out.items() if is_cache(v))
    n = given["input_ids"].shape[1]
    step = {"input_ids": torch.full((2, 1), 9), name: cache, "attention_mask": torch.ones(2, n + 1, dtype=torch.long)}
    with (
        host.edit("layers.1:out[text_mean]", lambda x: x + 1),
        pytest.raises(InputError, match=f"the cache holds {n} of each of 2 items, 0 of 0 were seen"),
    ):
        host.model(**step)


def test_a_prompt_in_pieces_is_a_prompt(host):
    """Phases go by whose tokens they are, not by whether the cache is empty."""
    batch, seen = host.collate.batch(["is there a red circle?", "what"], [None, None]), {}
    for size in (None, 3):
        seen[size] = []
        with host.edit("layers.0:out[all]", lambda x, w, to=seen[size]: to.append((w.prefill(), x)) or x, where=True):
            host.generate(batch, max_new_tokens=3, eos_token_id=None, do_sample=False, prefill_chunk_size=size)
    whole, pieces = ([(x, p) for p, x in seen[size]] for size in (None, 3))
    assert [p for _, p in whole] == [True, False, False]
    assert sum(p for _, p in pieces) > 1 and [p for _, p in pieces][-2:] == [False, False]
    rows = [sum(len(x) for x, p in calls if p) for calls in (whole, pieces)]
    assert rows[0] == rows[1] == batch.inputs["attention_mask"].sum()


def test_several_tokens_on_a_cache_of_an_unknown_prompt_have_no_phase():
    one = torch.zeros(1, dtype=torch.long)
    assert Where(one).prefill() and Where(one, prompt=None).prefill() and Where(one, start=3, prompt=4).prefill()
    assert not Where(one, start=4, prompt=4).prefill() and not Where(one, start=4).prefill()
    with pytest.raises(InputError, match="come onto a cache of 4, and whether they are the prompt's or were generated"):
        Where(one, start=4, prompt=None).prefill()
