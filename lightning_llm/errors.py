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


class NoGoodCheckpointError(SystemExit):
    """There are checkpoints, and none of them can be believed; the program ends with 77.

    It is a `SystemExit`, so that a script that nobody watches ends with the exit code which tells its scheduler that a
    restart will not help. What is wrong with which checkpoint has been logged by then, and is the exception's text.
    """

    EXIT_CODE: ClassVar[int] = 77

    def __init__(self, message: str) -> None:
        super().__init__(self.EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StragglerError(SystemExit):
    """This rank slows all others down and shall be left out; its program ends with 75, which asks for a restart."""

    EXIT_CODE: ClassVar[int] = 75

    def __init__(self, message: str) -> None:
        super().__init__(self.EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message
