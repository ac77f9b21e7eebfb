"""Imported once, by the server that ranks are forked from: a restart does not wait for imports.

Nothing here may touch a device: a CUDA context does not survive a fork.
"""

import os

import lightning.pytorch.cli  # noqa: F401

import lightning_llm  # noqa: F401
from lightning_llm._processes import die_with

die_with(os.getppid())  # the launcher, whose ranks end with this server
