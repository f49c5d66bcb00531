"""Errors that are the user's to put right."""


class InputError(ValueError):
    """Something the user gave is wrong; one sentence names it. The CLI prints it and exits with 2."""


class EndsJob(InputError):
    """What every unit of a job would meet, such as a full disk: the job ends, rather than going on without one unit."""


class NothingToGoBy(InputError):
    """What was given is sound and lacks what a step needs, so that who has other steps may go on without it."""
