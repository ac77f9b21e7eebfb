"""`LLMServeAPI`: the engine as a `litserve.LitAPI`."""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import os
import signal
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from litserve import LitAPI

from lightning_llm._processes import die_with
from lightning_llm.errors import ConfigurationError, NoGoodCheckpointError
from lightning_llm.serving.engine.config import EngineConfig
from lightning_llm.serving.engine.engine import Engine
from lightning_llm.serving.loading import LoadedModel, load_model
from lightning_llm.serving.server.client import EngineClient
from lightning_llm.serving.server.loop import EngineLoop
from lightning_llm.serving.server.spec import Attach, EngineSpec


class LLMServeAPI(LitAPI):
    """Serves a model.

        if __name__ == "__main__":  # workers import this file
            EngineServer(LLMServeAPI("runs/demo/model", max_num_seqs=64)).run(port=8000)

    LitServe's own `LitServer` serves it too, as well as it serves anything: SIGTERM does not drain and leaves a process
    of LitServe's behind, a worker that dies ends the server, and one that hangs stays.

    Args:
        model: A Hugging Face folder, a checkpoint of a training run, a `.gguf` file, `s3://...`, or a name on the hub.
        engine: Sizes and policies; None: made of `settings`.
        name: What clients call the model; None: what the source is called.
        dtype: Of the weights; "auto": as they are.
        revision: Of a model on the hub.
        chat_template: A file to use instead of the model's template.
        attach: Puts the routes onto LitServe's app, in front of an `EngineClient`; called once, in the main process.
            None: `app.put_together`, with everything as it is by default.
        **settings: Fields of `EngineConfig`, such as `kv_cache_blocks`.

    Raises:
        ConfigurationError: `EngineConfig` has no such field, or its sizes do not fit together.
    """

    def __init__(
        self,
        model: str | Path,
        engine: EngineConfig | None = None,
        *,
        name: str | None = None,
        dtype: torch.dtype | str = "auto",
        revision: str | None = None,
        chat_template: str | Path | None = None,
        attach: Attach | None = None,
        **settings: Any,
    ) -> None:
        unknown = sorted(settings.keys() - EngineConfig.__dataclass_fields__.keys())
        if unknown:
            fields = ", ".join(EngineConfig.__dataclass_fields__)
            raise ConfigurationError(f"LLMServeAPI has no setting {', '.join(unknown)}; it has {fields}.")
        if hasattr(self, "authorize"):
            raise ConfigurationError(
                f"{type(self).__name__}.authorize would not be asked: its routes are not LitServe's. Set "
                "LIT_SERVER_API_KEY, or let `attach` add a middleware of your own."
            )
        self.model = model
        self.engine_config = dataclasses.replace(engine or EngineConfig(), **settings)
        self.name = name
        self.dtype = dtype
        self.revision = revision
        self.chat_template = chat_template
        self.engine: Engine
        self.facts: dict[str, Any] = {}
        super().__init__(loop=EngineLoop(), spec=EngineSpec(attach or _put_together))

    def setup(self, device: str) -> None:
        """In a worker: loads the model."""
        transport = self.spec.transport
        worker = int(os.environ["LITSERVE_WORKER_ID"])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
        die_with(transport.main_pid)
        faulthandler.enable()  # a worker that hangs is ended by SIGABRT, and tells where it hung
        state = transport.board.workers[worker]
        state.pid, state.ready, state.busy = os.getpid(), False, False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // len(transport.board.workers)))
        try:
            loaded = load_model(
                self.model,
                name=self.name,
                dtype=self.dtype,
                device=device,
                revision=self.revision,
                chat_template=self.chat_template,
            )
            tokenizer = loaded.tokenizer
            self.engine = Engine(
                loaded.decoder,
                tokenizer.backend,
                self.engine_config,
                eos_token_ids=tokenizer.eos_token_ids,
                sharing=self.spec.workers_per_device,
            )
        except (ConfigurationError, NoGoodCheckpointError) as error:
            transport.complaint(worker).write_text(str(error), encoding="utf-8")
            logging.getLogger("litserve").setLevel(logging.CRITICAL)  # it would add a traceback; the main process tells
            raise
        self.facts = _facts(loaded, self.engine)

    def predict(self, x: Any, **kwargs: Any) -> Any:
        """LitServe's way to answer; `EngineLoop` steps the engine instead."""
        raise NotImplementedError("EngineLoop steps the engine; nothing calls predict")


def _put_together(app: FastAPI, client: EngineClient) -> None:
    from lightning_llm.serving.server.app import put_together  # here, because workers have no use for the routes

    put_together(app, client)


def _facts(loaded: LoadedModel, engine: Engine) -> dict[str, Any]:
    """What processes that speak HTTP must know of a model, without loading it."""
    return {
        "name": loaded.name,
        "folder": str(loaded.folder),
        "max_model_len": engine.max_model_len,
        "vocab_size": engine.vocab_size,
        "eos_token_ids": sorted(engine.eos_token_ids),
        "block_size": engine.config.block_size,
        "generation_defaults": loaded.generation_defaults,
    }
