"""Exceptions that a user is meant to read, and exit codes."""

from __future__ import annotations

from typing import Literal

# Why a process ended, as its status file says it; decides whether the run is queued again.
Cause = Literal["out_of_memory", "nan", "node", "disk", "configuration", "hang", "interrupted", "unknown"]

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

    cause: Cause = "configuration"

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        self.found, self.expected, self.remedy = found, expected, remedy
        super().__init__(f"found:    {found}\nexpected: {expected}\nremedy:   {remedy}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        """Its message is not its arguments, so pickling, on the way from a worker, must be told."""
        return type(self), (self.found, self.expected, self.remedy)


class DiskRefused(UserError):
    """A disk without room, or that cannot be written."""

    cause = "disk"


class RanksNotMet(UserError):
    """Ranks that were started never found one another: another start, on other nodes perhaps, may."""

    cause = "node"


class TrainingDiverged(UserError):
    """Losses or gradients that no skipped batch mends."""

    cause = "nan"


class TakenOver(UserError):
    """A newer start of the same run owns its folder now."""

    cause = "interrupted"


class RankFailed(Exception):
    """This rank cannot go on; what there is to say has been said."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(f"exit code {exit_code}")
