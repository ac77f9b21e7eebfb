"""OpenAI's HTTP interface: `attach` puts it in front of an `EngineLike`, be it LitServe's or another."""

from lightning_llm.serving.server.http.app import attach
from lightning_llm.serving.server.http.client import EngineLike, Tokenizer
from lightning_llm.serving.server.http.errors import APIError
from lightning_llm.serving.server.http.jobs import Job, Observer
from lightning_llm.serving.server.http.settings import HTTPSettings

__all__ = ["APIError", "EngineLike", "HTTPSettings", "Job", "Observer", "Tokenizer", "attach"]
