"""Errors that are the user's to put right."""


class InputError(ValueError):
    """Something the user gave is wrong; one sentence names it. The CLI prints it and exits with 2."""


class NothingToGoBy(InputError):
    """What was given is sound and lacks what a step needs, so that who has other steps may go on without it."""
