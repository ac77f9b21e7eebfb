"""`lightning-llm launch`: starts the ranks of a node, watches them, and starts them again when something goes wrong."""
