"""`lightning-llm fit` for the module of gpt.py: LightningCLI, so that everything can stand in a YAML file."""

import sys

from gpt import GPTModule

from lightning_llm.cli import trainer_cli

if __name__ == "__main__":
    sys.exit(trainer_cli(GPTModule))
