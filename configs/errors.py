"""Exceptions that a user is meant to read, and exit codes."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as shells say it of Ctrl-C
EXIT_STOPPED = 3  # interrupted on purpose, state saved: requeue me


class UserError(Exception):
    """Bad input or an unfit machine: printed without a traceback, exit code 2.

    Args:
        found: what was met, with the value.
        expected: what would have been right.
        remedy: what to type or change.
    """

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        self.found, self.expected, self.remedy = found, expected, remedy
        super().__init__(f"found:    {found}\nexpected: {expected}\nremedy:   {remedy}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        """Its message is not its arguments, so pickling, on the way from a worker, must be told."""
        return type(self), (self.found, self.expected, self.remedy)


class RankFailed(Exception):
    """This rank cannot go on; what there is to say has been said."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(f"exit code {exit_code}")
