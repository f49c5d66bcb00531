"""How strongly concept-level decoding acts, and the published settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from mmsae.errors import InputError


class Settings(NamedTuple):
    """Strengths of concept-level decoding.

    Attributes:
        alpha_c: Share of the steered logits in the mix; 0 is the control without concepts (one pass).
        beta_c: Tokens below this share of the clean pass's best probability are dropped; 0 drops none.
        alpha_m: How far the mean text state moves to the decoded one; 0 is the identity.
        beta_m: Share of the image in the code that is decoded.
        max_new_tokens: Most tokens of an answer.
        temperature: Divides the logits before a token is drawn.
        top_p: Tokens are drawn from the likeliest that together have this probability.
        do_sample: Whether tokens are drawn, as published, or the best is taken.
    """

    alpha_c: float = 0.6
    beta_c: float = 0.8
    alpha_m: float = 0.8
    beta_m: float = 0.9
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    do_sample: bool = True

    def check(self) -> None:
        """Refuse what makes no sense; names the field."""
        for name in ("alpha_c", "beta_c"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.max_new_tokens < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"max_new_tokens {self.max_new_tokens} must be at least 1, temperature {self.temperature} above 0, "
                f"top_p {self.top_p} above 0 and at most 1"
            )

    def control(self) -> Settings:
        """The same cut without concepts (``alpha_c`` 0): what the concepts have to beat."""
        return self._replace(alpha_c=0.0)

    def generation(self) -> dict[str, Any]:
        """Options of ``generate``."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p} if self.do_sample else {}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.do_sample, **sampling}


#: Settings that were published for LLaVA-1.5-7B (seed 55).
PRESETS = {"pope": Settings(), "chair": Settings(alpha_m=0.7, max_new_tokens=512)}
