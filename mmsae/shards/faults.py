"""What went wrong while shards were read: counted, listed with shard and key, and judged against a limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from mmsae.errors import EndsJob
from mmsae.types import Faults

NOTES = frozenset({"long_caption", "broken_json", "bad_utf8", "unsorted", "special_token"})
"""Kinds that are worth telling but do not drop the sample; every other kind is a drop."""

ASKED = frozenset({"duplicate", "not_in_keep"})
"""Kinds that drop the sample because the user asked for it: counted and listed, and not judged."""

JUDGE_AFTER = 1000
"""Samples seen before the share of drops is judged for the first time."""


class FaultLog:
    """A running count of samples seen and of what was wrong with some of them.

    One log lives in each worker; ``take`` drains it into the next batch, and the log of the main process merges what
    arrives. Kinds in :data:`NOTES` leave the sample in the data, those in :data:`ASKED` drop it as the user wants; all
    others drop it too, and only those are judged.

    Args:
        keep: Examples kept of each kind (the counts are exact, whatever this is).
    """

    def __init__(self, keep: int = 20) -> None:
        self.keep = keep
        self.n_seen = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[tuple[str, str, str, str]]] = {}

    def seen(self, n: int = 1) -> None:
        """Count ``n`` samples as looked at, good or bad."""
        self.n_seen += n

    def add(self, kind: str, shard: str, key: str, detail: str = "") -> None:
        """Count one fault of a kind, and keep it as an example while there are few of that kind."""
        self.counts[kind] += 1
        self._keep((kind, shard, key, detail))

    def pass_over(self) -> None:
        """Count a sample that a list of uids leaves out; it is not looked at, and none is an example."""
        self.counts["not_in_keep"] += 1

    def _keep(self, example: tuple[str, str, str, str]) -> None:
        kept = self.examples.setdefault(example[0], [])
        if len(kept) < self.keep:
            kept.append(example)

    def take(self) -> Faults:
        """What was counted since the last ``take``; the log is empty afterwards."""
        faults = Faults(self.n_seen, dict(self.counts), tuple(e for kept in self.examples.values() for e in kept))
        self.n_seen, self.counts, self.examples = 0, Counter(), {}
        return faults

    def merge(self, faults: Faults) -> None:
        """Add what another log counted."""
        self.n_seen += faults.seen
        self.counts.update(faults.counts)
        for example in faults.examples:
            self._keep(tuple(example))

    @property
    def dropped(self) -> int:
        """Samples that were dropped (a truncated shard counts as one: how many it lost is not known)."""
        return sum(n for kind, n in self.counts.items() if kind not in NOTES | ASKED)

    @property
    def share(self) -> float:
        """Dropped samples over samples seen."""
        return self.dropped / max(self.n_seen, 1)

    def check(self, limit: float, final: bool = False) -> None:
        """Refuse to go on with a larger share of drops than ``limit``; judged from 1,000 samples on, or if ``final``.

        Raises:
            EndsJob: If the share is above the limit.
        """
        if self.share > limit and (final or self.n_seen >= JUDGE_AFTER):
            raise EndsJob(
                f"{self.dropped} of {self.n_seen} samples ({self.share:.1%}) had to be dropped, more than the limit of"
                f" {limit:.1%}: {self.drops()}"
            )

    def drops(self) -> str:
        """What was dropped, and what may help, on one line."""
        kept = (e for kind, examples in self.examples.items() if kind not in NOTES | ASKED for e in examples)
        said = f"{self._counts(but=NOTES | ASKED)}; the first was {_line(next(kept, ('', '?', '', '')))}."
        if apart := self.counts["unsorted"]:
            how = "members of one sample must stand side by side, as tar --sort=name writes them."
            said += f" {apart} keys come again later in their tar: {how}"
        return said

    def _counts(self, only: Collection[str] = (), but: Collection[str] = ()) -> str:
        chosen = [(k, n) for k, n in self.counts.most_common() if k not in but and (not only or k in only)]
        return ", ".join(f"{kind} {n}" for kind, n in chosen)

    def summary(self) -> str:
        """A few lines for a person: the counts, then the kept examples one a line."""
        head = f"{self.n_seen} samples seen, {self.dropped} dropped ({self.share:.2%})"
        if drops := self._counts(but=NOTES | ASKED):
            head += f": {drops}"
        if asked := self._counts(ASKED):
            head += f"; dropped as asked: {asked}"
        if notes := self._counts(NOTES):
            head += f"; kept, but noted: {notes}"
        return "\n  ".join([head, *(_line(e) for kept in self.examples.values() for e in kept)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: ``seen, dropped, share, counts, examples``."""
        examples = [list(e) for kept in self.examples.values() for e in kept]
        head = {"seen": self.n_seen, "dropped": self.dropped, "share": self.share}
        return head | {"counts": dict(self.counts), "examples": examples}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> FaultLog:
        """The log that ``to_dict`` described."""
        log = cls()
        log.merge(Faults(saved["seen"], saved["counts"], tuple(tuple(e) for e in saved["examples"])))
        return log


def _line(example: tuple[str, str, str, str]) -> str:
    kind, shard, key, detail = example
    return " ".join(filter(None, (kind, shard, key, f"({detail})" if detail else "")))
