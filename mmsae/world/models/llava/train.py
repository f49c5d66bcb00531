"""What teaches the tiny LLaVA: dialogues over frozen image features, and the loss of their answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmsae.world.generator.scene import COLOURS, SHAPES
from mmsae.world.models import loop
from mmsae.world.models.llava.questions import DESCRIBE, NO, OBJECTS, YES, Lessons, ask, draw, near_misses
from mmsae.world.models.options import Training

TURNS = 4
END_WEIGHT = 0.1
ASKED = (0, 1, 2, 2, 2)  # colours, shapes, and most often whole objects, from the beginning: a curriculum was slower


@dataclass(frozen=True)
class LlavaTraining(Training):
    """How to train a LLaVA."""

    p_caption: float = 0.2
    """Share of dialogues that are a caption; the others are ``TURNS`` yes/no questions."""
    caption_weight: float = 0.5
    """Weight of the captions' loss beside the answers'."""


def image_features(model: nn.Module, images: np.ndarray, mean: list[float], std: list[float], device: Any) -> Tensor:
    """``(N, T, F) float16`` what the frozen vision tower says, computed once."""
    out, m, s = [], torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        for i in range(0, len(images), 500):
            x = torch.from_numpy(images[i : i + 500]).permute(0, 3, 1, 2).float() / 255
            out.append(model.model.vision_tower(((x - m) / s).to(device)).last_hidden_state.half().cpu())
    return torch.cat(out)


class Dialogues:
    """Batch ``step`` of the run, the same whether or not the steps before it were taken."""

    def __init__(self, lessons: Lessons, tokenizer: Any, n_image: int, r: LlavaTraining) -> None:
        self.lessons, self.r = lessons, r
        self.present = lessons.present
        by_kind = self.present.reshape(-1, len(COLOURS), len(SHAPES))
        near = near_misses(self.present)
        asked = self.present.any(1)
        self.tables = [  # what is there, and two sorts of what is not
            (by_kind.any(2), ~by_kind.any(2), ~by_kind.any(2), [f"{c} shape" for c in COLOURS]),
            (by_kind.any(1), ~by_kind.any(1), ~by_kind.any(1), list(SHAPES)),
            (self.present, ~self.present, near, list(OBJECTS)),
        ]
        self.says = {True: self._ids(tokenizer, YES), False: self._ids(tokenizer, NO)}
        self.eos, self.bos = [tokenizer.eos_token_id], [tokenizer.bos_token_id]
        user, assistant = self._ids(tokenizer, "USER:"), self._ids(tokenizer, "ASSISTANT:")
        self.first = [*self.bos, *user, *[tokenizer.convert_tokens_to_ids("<image>")] * n_image]
        self.asks = [[self._ids(tokenizer, ask(t)) + assistant for t in names] for *_, names in self.tables]
        self.user = user
        self.describe = self._ids(tokenizer, DESCRIBE) + assistant
        self.captions = [[self._ids(tokenizer, c) for c in several] for several in lessons.captions]
        self.own = [
            None if d is None else (self._ids(tokenizer, d[0]) + assistant, self._ids(tokenizer, d[1]))
            for d in lessons.dialogues
        ]
        self.can_ask, self.can_tell = asked, np.array([bool(c) for c in self.captions])

    @staticmethod
    def _ids(tokenizer: Any, text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def __call__(self, step: int) -> tuple[np.ndarray, Tensor, Tensor]:
        """Rows of the images ``(B,)``, token ids ``(B, L)``, and weights ``(B, L)`` of the tokens as targets."""
        r = self.r
        rng = np.random.default_rng([r.seed, 20, step])
        rows = rng.integers(0, len(self.present), size=r.batch_size)
        tell = np.where(self.can_ask[rows], rng.random(r.batch_size) < r.p_caption, True) & self.can_tell[rows]
        turns = self._turns(rows, rng)
        ids, weights = [], []
        for b, row in enumerate(rows.tolist()):
            out, w = list(self.first), [0.0] * len(self.first)
            if self.own[row] is not None:
                parts = [(*self.own[row], 1.0)]
            elif tell[b]:
                several = self.captions[row]
                parts = [(self.describe, several[int(rng.integers(len(several)))], r.caption_weight)]
            else:
                parts = [(q[b], a[b], 1.0) for q, a in turns]
            for i, (question, answer, weight) in enumerate(parts):
                opening = self.user if i else []
                out += [*opening, *question, *answer, *self.eos]
                end = weight if tell[b] else END_WEIGHT  # after yes and no it is no news
                w += [0.0] * (len(opening) + len(question)) + [weight] * len(answer) + [end]
            ids.append(torch.tensor(out))
            weights.append(torch.tensor(w))
        pad = nn.utils.rnn.pad_sequence
        return rows, pad(ids, batch_first=True), pad(weights, batch_first=True)

    def _turns(self, rows: np.ndarray, rng: np.random.Generator) -> list[tuple[list, list]]:
        """``TURNS`` questions and answers for every row."""
        out = []
        for _ in range(TURNS):
            kind = ASKED[int(rng.integers(len(ASKED)))]
            there, absent, near, _ = self.tables[kind]
            yes, hard = rng.random(len(rows)) < 0.5, rng.random(len(rows)) < 0.5
            pool = np.where(yes[:, None], there[rows], np.where(hard[:, None], near[rows], absent[rows]))
            thing = draw(pool, rng)
            out.append(([self.asks[kind][t] for t in thing], [self.says[bool(y)] for y in yes]))
        return out


def hidden_states(model: nn.Module, features: Tensor, ids: Tensor, image: int) -> Tensor:
    """``(B, L, D)`` last states of the language model, the projected features in the places of the image token."""
    inner = model.model
    x = inner.language_model.embed_tokens(ids)
    projected = inner.multi_modal_projector(features).flatten(0, 1)
    x = x.masked_scatter((ids == image)[..., None], projected.to(x))
    return inner.language_model(inputs_embeds=x, use_cache=False).last_hidden_state


def answer_loss(model: nn.Module, features: Tensor, ids: Tensor, weights: Tensor, image: int) -> Tensor:
    """Weighted cross-entropy of the answers; each weight class is a mean of its own.

    ``features (B, T, F)`` are of the vision tower, ``ids (B, L)`` padded on the right, ``weights (B, L)`` of tokens as
    targets (0: not predicted), ``image`` is the id of the image token.
    """
    hidden = hidden_states(model, features, ids, image)
    target = weights[:, 1:] > 0
    ce = nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][target]), ids[:, 1:][target], reduction="none")
    w = weights[:, 1:][target]
    return sum(v * ce[w == v].mean() for v in w.unique().tolist())


def train(
    model: nn.Module,
    features: Tensor,
    dialogues: Dialogues,
    r: LlavaTraining,
    state: loop.RunState | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train projector and language model in place, see :func:`mmsae.world.models.loop.train`.

    ``features (N, T, F)`` are of the frozen vision tower, ``dialogues`` the batches of what is said about them.
    """
    device, image = model.lm_head.weight.device, model.config.image_token_id
    learned = [(n, p) for n, p in model.named_parameters() if "vision_tower" not in n]
    opts = loop.optimizers(learned, ("embed_tokens", "lm_head"), r)

    def loss_of(step: int) -> Tensor:
        rows, ids, weights = dialogues(step)
        x = features[torch.from_numpy(rows)].to(device).float()
        return answer_loss(model, x, ids.to(device), weights.to(device), image)

    model.train().model.vision_tower.eval()
    params = [p for o in opts for g in o.param_groups for p in g["params"]]
    return loop.train(model, opts, loss_of, r, "LLaVA", params=params, state=state, progress=progress)
