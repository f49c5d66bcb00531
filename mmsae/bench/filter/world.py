"""An alignment set with known damage, and what the tiny LLaVA becomes when it is fine-tuned on a part of it.

Half of the samples are captions (``describe the image.``), half are yes/no questions about objects. Damage is
recorded: ``swapped``: the caption of another image; ``attribute``: one attribute of the caption is wrong; ``answer``:
yes and no exchanged.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmsae.world.generator.captions import damage, swap
from mmsae.world.generator.data import WorldData, generate
from mmsae.world.generator.shards import write_samples
from mmsae.world.models.llava.questions import DESCRIBE, NO, OBJECTS, YES, Lessons, Questions, object_questions
from mmsae.world.models.llava.train import Dialogues, LlavaTraining, answer_loss, hidden_states, image_features, train

#: Kinds of damage; the first two are of captions, the last of questions.
KINDS = ("swapped", "attribute", "answer")
CLEAN = ""


class Alignment(NamedTuple):
    """``n`` samples to fine-tune on."""

    images: np.ndarray  #: ``(n, 32, 32, 3) uint8``
    questions: list[str]  #: What the user says
    answers: list[str]  #: What the model is taught to say; wrong where damaged
    is_caption: np.ndarray  #: ``(n,) bool``, else it is a yes/no question
    kind: np.ndarray  #: ``(n,)`` of :data:`KINDS`, or empty for undamaged samples
    uids: list[str]  #: ``n`` sample ids

    @property
    def clean(self) -> np.ndarray:
        """``(n,) bool``: undamaged."""
        return self.kind == CLEAN

    def texts(self) -> list[str]:
        """One text per sample, for hosts that know no dialogue: the caption, or question and answer."""
        told = zip(self.is_caption, self.questions, self.answers, strict=True)
        return [a if caption else f"{q} {a}" for caption, q, a in told]

    def lessons(self, rows: np.ndarray) -> Lessons:
        """What fine-tuning on some of the samples teaches."""
        caption = self.is_caption[rows]
        pairs = [(self.questions[i], self.answers[i]) for i in rows.tolist()]
        return Lessons(
            self.images[rows],
            [[a] if c else [] for c, (_, a) in zip(caption, pairs, strict=True)],
            np.zeros((len(rows), len(OBJECTS)), bool),
            [None if c else p for c, p in zip(caption, pairs, strict=True)],
        )

    def write(self, out: str | Path) -> None:
        """Shards of it, with ``question``, ``answer`` and ``damage`` in the json."""
        rows = zip(self.uids, self.questions, self.answers, self.kind, strict=True)
        metas = [{"uid": u, "question": q, "answer": a, "damage": str(kind) or None} for u, q, a, kind in rows]
        write_samples(out, "align", self.images, self.texts(), metas, digits=7)


def mixed_questions(data: WorldData, seed: int) -> Questions:
    """One question per image, half of them with the answer no; half of the absent objects are near misses."""
    rng = np.random.default_rng([seed, 41])
    n = len(data.images)
    easy, hard = (object_questions(data.scenes, seed, kind) for kind in ("random", "adversarial"))
    pick = 2 * np.arange(n) + rng.integers(0, 2, n)  # questions come in pairs, one with each answer
    use = rng.random(n) < 0.5
    texts = [(easy if u else hard).texts[i] for u, i in zip(use, pick, strict=True)]
    answers = np.where(use, easy.answers[pick], hard.answers[pick])
    return Questions(np.arange(n), texts, answers, np.where(use, easy.objects[pick], hard.objects[pick]))


def alignment_set(n: int, seed: int, share: float = 0.4) -> Alignment:
    """Generate an alignment set; everything follows from ``seed``.

    ``share`` of the captions (half of them swapped, half with a wrong attribute) and of the questions is damaged.
    """
    data, rng = generate(n, seed), np.random.default_rng([seed, 40])
    order = rng.permutation(n)
    captions, asked = order[: n // 2], order[n // 2 :]
    is_caption = np.zeros(n, bool)
    is_caption[captions] = True
    kind = np.full(n, CLEAN, dtype=object)
    bad = round(share * len(captions))
    kind[captions[: bad // 2]], kind[captions[bad // 2 : bad]] = KINDS[:2]
    kind[asked[: round(share * len(asked))]] = KINDS[2]
    swapped, wrong = swap(data.full, seed, 1.0)[0], damage(data.scenes, seed)[0]
    q = mixed_questions(data, seed)
    told = {CLEAN: data.full, KINDS[0]: swapped, KINDS[1]: wrong}
    yes = q.answers != (kind == KINDS[2])
    return Alignment(
        data.images,
        [DESCRIBE if c else text for c, text in zip(is_caption, q.texts, strict=True)],
        [told[kind[i]][i] if is_caption[i] else (YES if yes[i] else NO) for i in range(n)],
        is_caption,
        kind,
        data.uids,
    )


def top_half(score: np.ndarray, is_caption: np.ndarray, seed: int, keep: float = 0.5) -> np.ndarray:
    """Rows of the best share of the captions and of the questions, rounded up, in their order.

    Scores of captions and of questions have different levels; kept together, a score would choose between tasks. Larger
    scores are better, equal ones are ordered by ``seed``.
    """
    tie = np.random.default_rng([seed, 42]).random(len(score))
    order = np.lexsort((tie, -score))
    parts = [order[is_caption[order] == c] for c in (True, False)]
    return np.sort(np.concatenate([p[: math.ceil(keep * len(p))] for p in parts]))


class Exam(NamedTuple):
    """Held-out clean scenes and what is asked about them."""

    features: Tensor  #: ``(m, T, F) float16`` of the frozen tower
    questions: dict[str, Questions]  #: ``{"random": ..., "adversarial": ...}``
    captions: list[str]  #: The ``m`` true captions


class Classroom:
    """The base LLaVA, the images as its frozen tower sees them, and everything that is done with copies of it."""

    def __init__(self, model: nn.Module, processor: Any, data: Alignment) -> None:
        self.model, self.data, self.tokenizer = model, data, processor.tokenizer
        self._images = processor.image_processor
        self.features = self.see(data.images)
        self.image = self.tokenizer.convert_tokens_to_ids("<image>")

    def see(self, images: np.ndarray) -> Tensor:
        """``(n, T, F) float16`` of the frozen tower."""
        return image_features(self.model, images, self._images.image_mean, self._images.image_std, "cpu")

    def exam(self, n: int, seed: int) -> Exam:
        """``n`` held-out scenes; each is asked for one object that is there and one that is not."""
        data = generate(n, seed, siblings=False)
        asked = {kind: object_questions(data.scenes, seed, kind) for kind in ("random", "adversarial")}
        return Exam(self.see(data.images), asked, data.full)

    def fine_tune(self, rows: np.ndarray, recipe: LlavaTraining) -> nn.Module:
        """A copy of the base model, trained on some samples."""
        model = copy.deepcopy(self.model).requires_grad_(True)
        model.model.vision_tower.requires_grad_(False)
        dialogues = Dialogues(self.data.lessons(rows), self.tokenizer, self.features.shape[1], recipe)
        features = self.features[torch.from_numpy(rows)]
        train(model, features, dialogues, recipe, progress=False)
        return model.eval()

    def _sequences(self, questions: list[str], answers: list[str] | None = None) -> tuple[Tensor, Tensor]:
        """Token ids ``(n, L)``, and weights ``(n, L)``: 1 at the answer; without answers, at the end of the prompt."""
        t = self.tokenizer

        def ids(text: str) -> list[int]:
            return t(text, add_special_tokens=False).input_ids

        first = [t.bos_token_id, *ids("USER:"), *[self.image] * self.features.shape[1]]
        known = {q: ids(q) + ids("ASSISTANT:") for q in set(questions)}
        prompts = [first + known[q] for q in questions]
        said = [[]] * len(prompts) if answers is None else [[*ids(a), t.eos_token_id] for a in answers]
        marks = [[0.0] * (len(p) - 1) + [float(not a)] + [1.0] * len(a) for p, a in zip(prompts, said, strict=True)]
        pad = nn.utils.rnn.pad_sequence
        rows = [torch.tensor(p + a) for p, a in zip(prompts, said, strict=True)]
        return pad(rows, batch_first=True), pad([torch.tensor(m) for m in marks], batch_first=True)

    @torch.no_grad()
    def _logits(self, model: nn.Module, features: Tensor, ids: Tensor) -> Tensor:
        """``(B, L, V)``."""
        return model.lm_head(hidden_states(model, features.float(), ids, self.image))

    def answer_scores(self, batch_size: int = 200) -> np.ndarray:
        """``(n,)`` mean log-likelihood of each sample's answer under the base model: a filter without any SAE."""
        out = []
        for i in range(0, len(self.features), batch_size):
            part = slice(i, i + batch_size)
            ids, marks = self._sequences(self.data.questions[part], self.data.answers[part])
            logits = self._logits(self.model, self.features[part], ids)
            said = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            out.append((said * marks[:, 1:]).sum(1) / marks[:, 1:].sum(1))
        return torch.cat(out).double().numpy()

    @torch.no_grad()
    def grade(self, model: nn.Module, exam: Exam, batch_size: int = 200) -> dict[str, float]:
        """Accuracy on both sorts of questions, share of yes, and the loss of true captions.

        The answer is the more likely one of yes and no. ``accuracy`` is the mean of ``random`` and ``adversarial``;
        ``caption_loss`` is in nats per token.
        """
        yes, no = (self.tokenizer.convert_tokens_to_ids(w) for w in (YES, NO))
        out: dict[str, float] = {}
        for kind, q in exam.questions.items():
            said = []
            for i in range(0, len(q.texts), batch_size):
                part = slice(i, i + batch_size)
                ids, marks = self._sequences(q.texts[part])
                logits = self._logits(model, exam.features[torch.from_numpy(q.row[part])], ids)[marks > 0]
                said.append(logits[:, yes] > logits[:, no])
            answers = torch.cat(said).numpy()
            out[kind] = float((answers == q.answers).mean())
            out[f"{kind}_yes"] = float(answers.mean())
        losses = []
        for i in range(0, len(exam.captions), batch_size):
            part = slice(i, i + batch_size)
            ids, marks = self._sequences([DESCRIBE] * len(exam.captions[part]), exam.captions[part])
            loss = answer_loss(model, exam.features[part].float(), ids, marks, self.image)
            losses.append((float(loss), float(marks.sum())))
        tokens = sum(n for _, n in losses)
        return {
            "accuracy": (out["random"] + out["adversarial"]) / 2,
            **out,
            "caption_loss": sum(x * n for x, n in losses) / tokens,
        }
