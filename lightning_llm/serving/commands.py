"""`lightning-llm serve`."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Literal

from lightning_llm.arguments import parse_arguments
from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.config import EngineConfig
from lightning_llm.serving.errors import ServerFailedError
from lightning_llm.serving.server.api import LLMServeAPI
from lightning_llm.serving.server.app import AppSettings, put_together
from lightning_llm.serving.server.http import HTTPSettings
from lightning_llm.serving.server.observability.logs import library_level, log_config
from lightning_llm.serving.server.server import EngineServer


def serve(
    model: str,
    *,
    host: str = "0.0.0.0",
    port: int = 8000,
    workers: int = 1,
    served_model_name: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    revision: str | None = None,
    chat_template: str | None = None,
    api_key_file: str | None = None,
    engine: EngineConfig,
    http: HTTPSettings,
    shown: AppSettings,
    drain_timeout: float = 30.0,
    hang_timeout: float = 120.0,
    log_format: Literal["auto", "json", "text"] = "auto",
    log_level: Literal["debug", "info", "warning", "error"] = "info",
) -> None:
    """Serve a model behind an OpenAI-compatible endpoint.

    Args:
        model: A Hugging Face folder, a checkpoint or a folder of them, a .gguf file, s3://..., or a name on the hub.
        host: Address to listen at: 0.0.0.0 is every one of this machine's, 127.0.0.1 this machine alone.
        port: 1024 to 65535.
        workers: Processes with an engine each, per device.
        served_model_name: What clients call the model; by default what its folder or file is called.
        dtype: Of the weights; auto is as they are.
        device: auto is a GPU if there is one.
        revision: Of a model on the hub; a commit pins it.
        chat_template: A file with a Jinja template to use instead of the model's.
        api_key_file: A file with the key that clients have to send; by default LIT_SERVER_API_KEY is the key, if set.
        engine: The engine.
        http: The HTTP interface.
        shown: What is shown.
        drain_timeout: Seconds that running requests get to end after SIGTERM or Ctrl-C.
        hang_timeout: Seconds without a step after which a worker that has requests is replaced.
        log_format: json for machines, text for people; auto is text on a terminal.
        log_level: Least that is logged.
    """
    key = None if api_key_file is None else _key_in(api_key_file)
    api = LLMServeAPI(
        model,
        engine,
        name=served_model_name,
        dtype=dtype,
        revision=revision,
        chat_template=chat_template,
        attach=partial(put_together, http=http, shown=shown, api_key=key),
    )
    server = EngineServer(
        api,
        accelerator=device,
        workers_per_device=workers,
        drain_timeout=drain_timeout,
        hang_timeout=hang_timeout,
    )
    written = ("text" if sys.stderr.isatty() else "json") if log_format == "auto" else log_format
    server.run(
        host,
        port,
        log_level=library_level(log_level).lower(),
        log_config=log_config(written, log_level.upper()),
        access_log=False,
    )
    # All processes have ended and nothing is left to clean up: Python would take seconds to tidy torch away.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _key_in(file: str) -> str:
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--api-key-file {file} cannot be read: {error}.") from None
    if not key:
        raise ConfigurationError(f"--api-key-file {file} is empty: put the key into it.")
    return key


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    try:
        serve(**parse_arguments(serve, arguments))
    except ServerFailedError as error:
        print(f"lightning-llm: {error}", file=sys.stderr)
        return 1
    return 0
