"""`python -m lightning_llm` is the command `lightning-llm`."""

import sys

from lightning_llm.cli import main

sys.exit(main())
