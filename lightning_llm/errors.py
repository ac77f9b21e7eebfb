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
