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
