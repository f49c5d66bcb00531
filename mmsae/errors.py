"""The one error that is the user's to put right."""


class InputError(ValueError):
    """Something the user gave is wrong; one sentence names it. The CLI prints it and exits with 2."""
