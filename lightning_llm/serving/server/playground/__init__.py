"""A page to talk to the model with, and to watch the engine while it answers."""

from lightning_llm.serving.server.playground.routes import attach_playground

__all__ = ["attach_playground"]
