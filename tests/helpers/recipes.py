"""SAEs as recipes describe them, made small and trained without a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmsae import SAE, Tokens
from mmsae.recipes import instantiate, read_recipe
from mmsae.sae import LossContext, UsageTracker

ROOT = Path(__file__).parents[2]
SAE_RECIPES = sorted((ROOT / "configs" / "sae").glob("*.yaml"))


def small_model(path: Path, d_in: int = 16, d_sae: int = 48, k: int = 4) -> tuple[SAE, list[Any]]:
    """The SAE of a recipe at a small size, built, and its loss terms; ``k`` replaces the recipe's (and its steps)."""
    model = read_recipe(path)["model"]
    arguments = model["sae"]["init_args"]
    arguments.pop("ratio", None)
    arguments.update(d_sae=d_sae)
    for part in ("selector", "encoder"):
        inner = arguments.get(part, {}).get("init_args", {})
        inner.update({name: k for name in ("k", "steps") if name in inner})
    for term in model["losses"]:
        if "target" in term.get("init_args", {}):
            term["init_args"]["target"] = k
    sae = instantiate(model["sae"])
    sae.build(d_in)
    return sae, instantiate(model["losses"])


def atoms_rows(n: int, d: int = 16, n_atoms: int = 32, k: int = 3, seed: int = 0) -> torch.Tensor:
    """``(n, d)`` sparse non-negative combinations of known unit atoms."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(n_atoms, d, generator=torch.Generator().manual_seed(99)))
    on = torch.rand(n, n_atoms, generator=generator).topk(k).indices
    values = torch.rand(n, k, generator=generator) + 0.5
    return torch.zeros(n, n_atoms).scatter(1, on, values) @ atoms


def batch(sae: SAE, n: int, seed: int = 0, grad: bool = True) -> Tokens:
    """A batch of pairs for the modalities of an SAE, with gradients of some loss."""
    x = {m: atoms_rows(n, sae.d_in[m], seed=seed) + 0.02 * i for i, m in enumerate(sae.modalities)}
    grads = {m: torch.roll(v, 1, 0) for m, v in x.items()} if grad else None
    return Tokens.pooled(x)._replace(grad=grads)


class Run:
    """A training without a trainer, whose whole state can be taken and put back."""

    def __init__(self, sae: SAE, losses: list[Any], lr: float = 3e-3, steps: int = 200) -> None:
        self.sae, self.losses, self.steps, self.step = sae.train(), torch.nn.ModuleList(losses), steps, 0
        self.usage = UsageTracker(sae.d_sae, sae.modalities)
        for term in losses:
            term.check(sae)
            term.build(sae)
        weights = [p for p in sae.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(weights, lr) if weights else None

    def go(self, n: int) -> list[float]:
        """Do n steps; their losses."""
        return [self.on(batch(self.sae, 64, seed=1 + self.step)) for _ in range(n)]

    def on(self, tokens: Tokens) -> float:
        """Do one step on a batch; its loss."""
        outputs = self.sae(tokens)
        context = LossContext(self.sae, self.usage, self.step / self.steps, self.step)
        loss = torch.stack([torch.as_tensor(term(outputs, context)) for term in self.losses]).sum()
        self.usage.update({m: out.codes for m, out in outputs.items()})
        self.sae.grow_(tokens, outputs)
        if self.optimizer is not None:
            self.optimizer.zero_grad()
            loss.backward()
            self.sae.remove_parallel_grad_()
            self.optimizer.step()
        self.sae.after_step_()
        self.step += 1
        return float(loss)

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint would hold."""
        return {
            "sae": self.sae.state_dict(),
            "losses": self.losses.state_dict(),
            "usage": self.usage.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "step": self.step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.sae.load_state_dict(state["sae"])
        self.losses.load_state_dict(state["losses"])
        self.usage.load_state_dict(state["usage"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
