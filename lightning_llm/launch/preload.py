"""Imported once, by the server that ranks are forked from: a restart does not wait for imports.

Nothing here may touch a device: a CUDA context does not survive a fork.
"""

import os

from lightning_llm._processes import die_with

os.setsid()  # before the imports, which take long: what a scheduler sends to the launcher's group is for the launcher
die_with(os.getppid())  # the launcher, whose ranks end with this server

import lightning.pytorch.cli  # noqa: E402, F401

import lightning_llm  # noqa: E402, F401
