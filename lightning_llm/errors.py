"""The errors that a user can cause. Every room raises them; `cli.py` turns them into exit code 2."""

from __future__ import annotations

from typing import ClassVar


class ConfigurationError(ValueError):
    """A setting, file or combination of sizes that cannot work.

    The message says what was wrong, where, and what to change. The command line prints it alone, without a traceback.

    Attributes:
        latest: The one that was made last in this process, to be found again where a library wraps its text.
    """

    latest: ClassVar[ConfigurationError | None] = None

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        ConfigurationError.latest = self


class CheckpointError(RuntimeError):
    """A checkpoint that could not be saved. Nothing that was committed before is affected."""


class EndOfRunError(SystemExit):
    """The run ends here, with an exit code that tells a scheduler what to do with it.

    It is a `SystemExit`, so that a script that nobody watches ends with that code. Why it ends has been logged by then,
    and is the exception's text.
    """

    EXIT_CODE: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(self.EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class PreemptedError(EndOfRunError):
    """The run was told to stop and has saved what it needs to go on; exit code 75 (`EX_TEMPFAIL`): queue it again."""

    EXIT_CODE = 75


class DivergedError(EndOfRunError):
    """Training has diverged, and neither skipping nor rewinding has helped; exit code 76: a restart will not help."""

    EXIT_CODE = 76


class NoGoodCheckpointError(EndOfRunError):
    """There are checkpoints, and none of them can be believed; exit code 77: a restart will not help."""

    EXIT_CODE = 77


class TakenOverError(EndOfRunError):
    """Another run goes on from this one's checkpoints, since it was taken for dead; exit code 93: do not restart."""

    EXIT_CODE = 93


class StragglerError(EndOfRunError):
    """This rank slows all others down and shall be left out; exit code 75: queue it again, without this machine."""

    EXIT_CODE = 75
