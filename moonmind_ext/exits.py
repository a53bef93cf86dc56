"""How a command ends when it did not do what was asked."""

EXIT_USAGE = 2
EXIT_FOREIGN_JOB = 65
EXIT_NO_INPUT = 66
EXIT_ENGINE = 75
EXIT_QUEUE = 75
EXIT_INTERRUPTED = 130
"""Those of sysexits.h, timeout(1) and shells."""


class ExitError(Exception):
    """Ends the command with a message for people.

    Attributes
    ----------
    code
        What the process exits with.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
