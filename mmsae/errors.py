"""Errors that are the user's to put right, and warnings that are the user's to know."""

from __future__ import annotations

import warnings


class InputError(ValueError):
    """Something the user gave is wrong; one sentence names it. The CLI prints it and exits with 2."""


class EndsJob(InputError):
    """What every unit of a job would meet, such as a full disk: the job ends, rather than going on without one unit."""


class NothingToGoBy(InputError):
    """What was given is sound and lacks what a step needs, so that who has other steps may go on without it."""


class Warned(UserWarning):
    """Something the user should know though the work goes on; the command line prints it as one sentence."""


class OldName(Warned, FutureWarning):
    """A name that goes in a later release."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it comes from, is that a device had no memory left.

    Torch's error of a device is known by its name, which is also how a job says why a shard failed, and that of the
    host's memory, which has no type of its own, by its words.
    """
    while error is not None:
        said = f"{type(error).__name__}: {error}"
        if "OutOfMemoryError" in said or "DefaultCPUAllocator: can't allocate memory" in said:
            return True
        error = error.__cause__
    return False


def plain_warnings() -> None:
    """From now on, print our own warnings as a sentence, without the line of the program that gave them.

    Those of libraries stay as they are: without their place nobody knows of what they are.
    """
    before = warnings.formatwarning
    if getattr(before, "plain", False):
        return

    def sentence(message: Warning | str, category: type[Warning], *where: object, **more: object) -> str:
        if issubclass(category, Warned):
            return f"mmsae: warning: {message}\n"
        return before(message, category, *where, **more)

    sentence.plain = True
    warnings.formatwarning = sentence
