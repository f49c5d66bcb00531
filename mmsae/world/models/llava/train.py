"""The loop that teaches the tiny LLaVA: dialogues over frozen image features, and a state file for killed runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmsae.files import atomic_file
from mmsae.world.generator.scene import COLOURS, SHAPES
from mmsae.world.models.contrastive import schedule
from mmsae.world.models.llava.questions import DESCRIBE, NO, OBJECTS, YES, Lessons, ask, draw, near_misses
from mmsae.world.models.loop import Muon

TURNS = 4
END_WEIGHT = 0.1
ASKED = (0, 1, 2, 2, 2)  # colours, shapes, and most often whole objects, from the beginning: a curriculum was slower


class LlavaRecipe(NamedTuple):
    """How to train.

    Attributes:
        steps: Optimiser steps.
        batch_size: Dialogues a step.
        seed: Of order and questions.
        lr: Peak learning rate of Muon (weight matrices).
        adam_lr: Peak learning rate of AdamW (embeddings, head, norms, biases).
        weight_decay: Of matrices.
        p_caption: Share of dialogues that are a caption; the others are ``TURNS`` yes/no questions.
        caption_weight: Weight of the captions' loss beside the answers'.
    """

    steps: int
    batch_size: int = 32
    seed: int = 0
    lr: float = 0.01
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    p_caption: float = 0.2
    caption_weight: float = 0.5


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

    def __init__(self, lessons: Lessons, tokenizer: Any, n_image: int, r: LlavaRecipe) -> None:
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
        """Rows of the pictures ``(B,)``, token ids ``(B, L)``, and weights ``(B, L)`` of the tokens as targets."""
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


def answer_loss(model: nn.Module, features: Tensor, ids: Tensor, weights: Tensor, image: int) -> Tensor:
    """Weighted cross-entropy of the answers; each weight class is a mean of its own.

    Args:
        model: The LLaVA.
        features: ``(B, T, F)`` of its vision tower.
        ids: ``(B, L)``, padded on the right.
        weights: ``(B, L)`` of tokens as targets; 0: not predicted.
        image: Id of the image token.
    """
    inner = model.model
    x = inner.language_model.embed_tokens(ids)
    projected = inner.multi_modal_projector(features).flatten(0, 1)
    x = x.masked_scatter((ids == image)[..., None], projected.to(x))
    hidden = inner.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
    target = weights[:, 1:] > 0
    ce = nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][target]), ids[:, 1:][target], reduction="none")
    w = weights[:, 1:][target]
    return sum(v * ce[w == v].mean() for v in w.unique().tolist())


def optimizers(model: nn.Module, r: LlavaRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of decoder and projector, AdamW for the rest."""
    named = [(n, p) for n, p in model.named_parameters() if "vision_tower" not in n]
    table = ("embed_tokens", "lm_head")
    matrices = [p for n, p in named if p.ndim >= 2 and not any(t in n for t in table)]
    tables = [p for n, p in named if p.ndim >= 2 and any(t in n for t in table)]
    groups = [{"params": tables, "weight_decay": r.weight_decay}]
    groups.append({"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0})
    return [
        Muon(matrices, lr=r.lr, weight_decay=r.weight_decay),
        torch.optim.AdamW(groups, lr=r.adam_lr, betas=(0.9, 0.98), fused=True),
    ]


def train(
    model: nn.Module,
    features: Tensor,
    dialogues: Dialogues,
    r: LlavaRecipe,
    *,
    state_file: Path,
    identity: dict[str, Any],
    checkpoint_every: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train projector and language model in place; the vision tower is frozen.

    Args: as :func:`mmsae.world.models.contrastive.train`; ``features (N, T, F)`` are those of the frozen tower.

    Returns:
        ``{"loss": running mean, "curve": [[step, loss], ...], "first_step": where it started}``.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    device, image = model.lm_head.weight.device, model.config.image_token_id
    opts = optimizers(model, r)
    peaks = [g["lr"] for o in opts for g in o.param_groups]
    first, curve = _load(state_file, identity, model, opts)
    groups = [g for o in opts for g in o.param_groups]  # loading makes new ones
    params = [p for g in groups for p in g["params"]]
    if progress and state_file.exists():
        print(f"going on from step {first} of {state_file}" if first else f"{state_file} is of another run: not used")
    model.train()
    model.model.vision_tower.eval()
    mean = curve[-1][1] if curve else math.nan
    bar = tqdm(range(first, r.steps), initial=first, total=r.steps, desc="training LLaVA", disable=not progress)
    for step in bar:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, r.steps)
        rows, ids, weights = dialogues(step)
        x = features[torch.from_numpy(rows)].to(device).float()
        loss = answer_loss(model, x, ids.to(device), weights.to(device), image)
        for o in opts:
            o.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for o in opts:
            o.step()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}: lower the learning rate (now {r.lr:g})")
        mean = value if math.isnan(mean) else 0.95 * mean + 0.05 * value
        if (step + 1) % 20 == 0 or step + 1 == r.steps:
            curve.append([step + 1, mean])
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if checkpoint_every and (step + 1) % checkpoint_every == 0 and step + 1 < r.steps:
            state = {"identity": json.dumps(identity, sort_keys=True), "step": step + 1, "curve": curve}
            state |= {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}
            with atomic_file(state_file) as temp:
                torch.save(state, temp)
    model.eval()
    return {"loss": mean, "curve": curve, "first_step": first}


def _load(path: Path, identity: dict, model: nn.Module, opts: list) -> tuple[int, list[list[float]]]:
    """The step to go on from (0 without a state of the same run) and the loss curve until there."""
    if not path.exists():
        return 0, []
    state = torch.load(path, map_location=model.lm_head.weight.device, weights_only=True)
    if state["identity"] != json.dumps(identity, sort_keys=True):
        return 0, []
    model.load_state_dict(state["model"])
    for o, s in zip(opts, state["optimizers"], strict=True):
        o.load_state_dict(s)
    return state["step"], state["curve"]
