"""The errors that a user can cause. Every room raises them; `cli.py` turns them into exit code 2."""


class ConfigurationError(ValueError):
    """A setting, file or combination of sizes that cannot work.

    The message says what was wrong, where, and what to change. The command line prints it alone, without a traceback.
    """
