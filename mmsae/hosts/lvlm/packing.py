"""Several conversations in one sequence: what sequential training (FAST, arXiv 2506.07691) is compared with.

Conversations follow each other as they come, as many as fit; none is cut, since an image cannot be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmsae.hosts.lvlm.prompt import Collator
from mmsae.types import ImageTextBatch

SEGMENTS, PLACES = "segments", "places"  # of every token: number of its conversation (padding: -1), and place in it


class Packer:
    """Makes batches of blocks of at most ``collator.context_length`` tokens.

    ``segments`` and ``places`` ``(blocks, L)`` of the batch's inputs say to which sample a token belongs.

    Args:
        collator: Makes the sequences, of which the batch's ``uids`` are.
        separate: Whether each conversation has positions of its own and sees itself alone; else it sees all before it
            in its block, and positions go on.
    """

    def __init__(self, collator: Collator, separate: bool) -> None:
        self.collator, self.separate, self.need = collator, separate, collator.need

    def __call__(self, samples: Sequence[Any]) -> ImageTextBatch:
        """A batch of samples, packed."""
        return self.pack(self.collator(samples))

    def pack(self, batch: ImageTextBatch) -> ImageTextBatch:
        """The conversations of a batch in blocks; images stay in their order."""
        inputs = dict(batch.inputs)
        real = inputs["attention_mask"] != 0
        inputs[SEGMENTS] = torch.arange(len(real))[:, None].expand_as(real)
        inputs[PLACES] = (real.long().cumsum(1) - 1).clamp(min=0)
        blocks = _fill(real.sum(1).tolist(), self.collator.context_length)
        width = max(sum(int(real[i].sum()) for i in block) for block in blocks)
        filling = {"input_ids": self.collator.processor.tokenizer.pad_token_id or 0, SEGMENTS: -1}
        for name, value in inputs.items():
            if value.shape == real.shape:
                packed = value.new_full((len(blocks), width), filling.get(name, 0))
                for b, block in enumerate(blocks):
                    tokens = torch.cat([value[i][real[i]] for i in block])
                    packed[b, : len(tokens)] = tokens
                inputs[name] = packed
        if self.separate:
            inputs["position_ids"] = inputs[PLACES]
        return batch._replace(texts=inputs["input_ids"], inputs=inputs)


def _fill(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the conversations in each block, in their order."""
    blocks: list[list[int]] = []
    room = 0
    for i, n in enumerate(lengths):
        if not blocks or n > room:
            blocks.append([])
            room = size
        blocks[-1].append(i)
        room -= n
    return blocks


def own_attention(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, 1, L, L)`` mask to be added: 0 where a token sees one of its own conversation that is not behind it."""
    n = segments.shape[1]
    sees = (segments[:, :, None] == segments[:, None]) & torch.ones(n, n, device=segments.device).tril().bool()
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)[:, None]
