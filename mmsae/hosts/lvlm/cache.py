"""The key-value cache of a forward call, found by what it is.

transformers called it ``past_key_values`` until 5.23 and ``cache`` since; a cache under a name that nobody looked for
made every step of a generation look like a new prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import Cache

from mmsae.types import InputError


def is_cache(value: Any) -> bool:
    """Whether it is a ``Cache``, or the older form: a tuple with ``(keys, values)`` ``(B, heads, T, d)`` per layer."""
    if isinstance(value, Cache):
        return True

    def layer(x: Any) -> bool:
        return isinstance(x, (tuple, list)) and len(x) > 1 and all(isinstance(t, Tensor) and t.ndim == 4 for t in x[:2])

    return isinstance(value, (tuple, list)) and len(value) > 0 and all(map(layer, value))


def caches(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[int | str, Any]]:
    """``(place, cache)`` of every cache among the arguments of a call; the place is an index or a keyword."""
    yield from ((k, v) for k, v in [*enumerate(args), *kwargs.items()] if is_cache(v))


def length(cache: Any) -> int:
    """Tokens in a cache.

    One that keeps none (purely recurrent models) is refused, for prompt and answer look alike.
    """
    if not isinstance(cache, Cache):
        return int(cache[0][0].shape[-2])
    try:
        return int(cache.get_seq_length())
    except (ValueError, NotImplementedError) as e:
        raise _lost(f"its {type(cache).__name__} does not count tokens ({e})") from e


def cached(args: Sequence[Any], kwargs: Mapping[str, Any], prompt: int | None = None) -> int:
    """Tokens that a call finds in its cache: 0 in a prefill and without a cache.

    ``prompt`` is the number of tokens of the prompt that is being worked on, where it is known.

    Raises:
        InputError: The call does not say: it has an unknown kind of cache, caches of unequal length, or none although
            it goes on from tokens that it does not hold.
    """
    found = {k: length(c) for k, c in caches(args, kwargs)}
    for name, value in kwargs.items():
        if name in found or value is None or isinstance(value, (bool, int, str, Tensor)):
            continue
        if "cache" in name or name.startswith("past"):
            raise _lost(f"its {name} is of a kind that is not known here, {type(value).__name__}")
    if len(set(found.values())) > 1:
        raise _lost("its caches have unequal lengths: " + ", ".join(f"{k} {n}" for k, n in found.items()))
    if found:
        return next(iter(found.values()))
    ids, mask, at = args[0] if args else kwargs.get("input_ids"), kwargs.get("attention_mask"), "cache_position"
    if isinstance(kwargs.get(at), Tensor) and kwargs[at].numel() and int(kwargs[at].min()) > 0:
        raise _lost(f"it has no cache although its {at} begins at {int(kwargs[at].min())}")
    if isinstance(ids, Tensor):
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > ids.shape[1]:
            raise _lost(f"it has no cache although its mask covers {mask.shape[1]} tokens and it holds {ids.shape[1]}")
        if prompt is not None and ids.shape[1] < prompt:
            raise _lost(f"it has no cache although the prompt has {prompt} tokens and it holds {ids.shape[1]}")
    return 0


def _lost(why: str) -> InputError:
    return InputError(f"a call of the model does not tell whether it reads the prompt or goes on from it: {why}.")
