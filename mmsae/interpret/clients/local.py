"""A model of transformers in this process: a vision-language model, or a language model for texts alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mmsae.fingerprint import fingerprint
from mmsae.interpret.clients.client import Client, Message, Reply
from mmsae.types import InputError


class LocalClient(Client):
    """A model of transformers, by folder or hub id, answering greedily.

    Args:
        model: ``lvlm:FOLDER_OR_ID`` for a vision-language model, else a causal language model.
        device: Where it runs.
        precision: Arithmetic.
        max_tokens: Length of answers.
    """

    scores = True

    def __init__(self, model: str, device: str = "auto", precision: str = "fp32", max_tokens: int = 64):
        self.name, self.device, self.precision = model, device, precision
        self.params = {"max_tokens": max_tokens, "precision": precision}

    @classmethod
    def around(cls, host: Any, max_tokens: int = 64) -> LocalClient:
        """Around an LVLM host that is loaded already, whose edits hold while it answers."""
        made = cls(host.hint, max_tokens=max_tokens)
        made.__dict__["host"] = host
        return made

    @property
    def sees(self) -> bool:
        """Whether it takes images."""
        return self.name.startswith("lvlm:")

    @cached_property
    def identity(self) -> dict[str, str]:
        """The fingerprint of the weights: what is in a folder, or at a hub id, may have become another model."""
        if self.sees:
            return {"weights": self.host.fingerprint}
        model = self._language[0]
        return {"weights": fingerprint({"class": type(model).__name__}, model.state_dict())}

    @cached_property
    def host(self) -> Any:
        """The vision-language host."""
        from mmsae.hosts import load_host, pick_device

        return load_host(self.name, pick_device(self.device), self.precision)

    @cached_property
    def _language(self) -> tuple[Any, Any]:
        """``(model, tokenizer)``, of the vision-language model too."""
        if self.sees:
            return self.host.model, self.host.processor.tokenizer
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from mmsae.hosts import pick_device

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        try:
            model = AutoModelForCausalLM.from_pretrained(self.name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(self.name)
        except (OSError, ValueError, KeyError) as e:
            raise InputError(f"client {self.name} is no causal language model of transformers: {e}") from e
        return model.eval().to(pick_device(self.device)), tokenizer

    def chat(self, messages: Sequence[Message]) -> Reply:
        if self.sees:
            return self._see(messages)
        if any(m.images for m in messages):
            raise InputError(f"client {self.name} reads no images: name a vision-language model, lvlm:...")
        model, tokenizer = self._language
        turns = [{"role": m.role, "content": m.text} for m in messages]
        plain = "\n\n".join(m.text for m in messages) + "\n"
        text = plain
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=text is plain)["input_ids"].to(model.device)
        room = getattr(model.config, "max_position_embeddings", 10**9) - self.params["max_tokens"]
        ids = ids[:, -max(1, room) :]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=pad,
                                 max_new_tokens=self.params["max_tokens"])  # fmt: skip
        new = out[0, ids.shape[1] :]
        return Reply(tokenizer.decode(new, skip_special_tokens=True).strip(), ids.shape[1], len(new))

    def _see(self, messages: Sequence[Message]) -> Reply:
        from PIL import Image

        images = [Image.open(io.BytesIO(i)).convert("RGB") for m in messages for i in m.images]
        batch = self.host.collate.batch(["\n\n".join(m.text for m in messages)], [images or None])
        text = self.host.answer(batch, max_new_tokens=self.params["max_tokens"])[0]
        tokens = len(self.host.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Reply(text, int(batch.inputs["attention_mask"].sum()), tokens)

    @torch.no_grad()
    def score(self, prefix: str, continuation: str) -> np.ndarray:
        model, tokenizer = self._language
        before = tokenizer(prefix, return_tensors="pt")["input_ids"]
        after = tokenizer(continuation, return_tensors="pt", add_special_tokens=False)["input_ids"]
        if not before.shape[1]:
            raise InputError(
                f"client {self.name} cannot score a text without a prefix: its tokenizer begins with nothing"
            )
        ids = torch.cat([before, after], 1).to(model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
        logs = torch.log_softmax(logits, 1).gather(1, ids[0, 1:, None])[:, 0]
        return logs[before.shape[1] - 1 :].double().cpu().numpy()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        model, tokenizer = self._language
        rows = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
            states = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
            )
            rows.append(states.hidden_states[-1][0].float().mean(0).cpu().numpy())
        out = np.stack(rows)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
