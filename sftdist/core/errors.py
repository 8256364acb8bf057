"""The errors a user can cause, each with the exit code that the command line ends with.

Every message has three parts: what was given, what is required, what to change.
"""

from __future__ import annotations

from collections.abc import Sequence


class SftdistError(Exception):
    """Base of every error that ends a command with a message instead of a traceback.

    `reported`: a session has said it already, with the rank and what that was doing. Under torchrun a session marks
    every exception so, and says its traceback, too.
    """

    exit_code = 1
    reported = False


class ConfigError(SftdistError):
    """The configuration cannot be run. Holds every issue that was found, not only the first."""

    exit_code = 2
    shown = 10

    def __init__(self, issues: str | Sequence[str]) -> None:
        self.issues = [issues] if isinstance(issues, str) else list(issues)
        lines = self.issues[: self.shown]
        if len(self.issues) > self.shown:
            lines[-1] = f"... and {len(self.issues) - self.shown + 1} more"
        super().__init__("\n".join(lines))


class DataError(SftdistError):
    """The data cannot be trained on: `file:line: field: what was given, what is required`."""

    exit_code = 3


class DataAbsentError(DataError):
    """The data is not there yet: no file, or no token store for a source that is too large to make in passing."""


class CheckpointError(SftdistError):
    """A checkpoint or an export is missing, incomplete or not what its manifest says."""


class StartupError(SftdistError):
    """A check of the start-up contract failed: the run would have trained something else."""


class TrainingError(SftdistError):
    """Training cannot go on, and another try would end the same way: a non-finite step."""


class DiskError(SftdistError):
    """A disk that is full, read-only or forbidden: for the user to mend, wherever in the program it is met."""


class WorkerLostError(SftdistError):
    """A process that this one had started is gone, and what it was doing with it."""


class GateError(SftdistError):
    """The candidate did not pass the gate."""

    exit_code = 4


class HubError(SftdistError):
    """The Hub has refused a release, or could not be reached."""
