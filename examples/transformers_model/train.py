"""`lightning-llm fit` for models of transformers: LightningCLI, so that everything can stand in a YAML file."""

import sys

from causal_lm import CausalLMModule

from lightning_llm.cli import trainer_cli

if __name__ == "__main__":
    sys.exit(trainer_cli(CausalLMModule))
