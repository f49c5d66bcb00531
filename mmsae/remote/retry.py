"""Trying again, later and later, what may pass."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from mmsae.errors import InputError

TRIES = 6
"""How often something is tried; with the waits between, for some half a minute."""
FIRST_WAIT = 1.0
"""Seconds before the second try; every further wait is twice as long, by a random part less."""
LONGEST_WAIT = 60.0
"""Seconds, also where a server asks for more."""

Made = TypeVar("Made")


class MayPass(Exception):
    """Something failed that may work later; ``wait`` seconds were asked for."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


def retried(what: str, work: Callable[[], Made], tries: int | None = None) -> Made:
    """What ``work`` gives, after as many tries as it takes.

    Raises:
        InputError: It failed every time; ``what`` and the last reason are named.
    """
    tries, wait, why = TRIES if tries is None else tries, FIRST_WAIT, ""
    for n in range(tries):
        try:
            return work()
        except MayPass as e:
            why = str(e)
            if n + 1 < tries:
                time.sleep(min(LONGEST_WAIT, max(e.wait, wait * random.uniform(0.5, 1))))
                wait *= 2
    raise InputError(f"{what}: {why} (tried {tries} times); what is finished is kept, run the same command again")
