"""Our server, as serve.py measures it: SmolLM2 behind LitServe, the engine's own loop and OpenAI's routes."""

from __future__ import annotations

import argparse

from lightning_llm.serving.server.api import LLMServeAPI
from lightning_llm.serving.server.http.app import attach
from lightning_llm.serving.server.server import EngineServer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    arguments = parser.parse_args()
    api = LLMServeAPI(
        arguments.model,
        name="model",
        dtype=arguments.dtype,
        attach=attach,
        max_model_len=2048,
        max_num_seqs=arguments.max_num_seqs,
    )
    EngineServer(api, accelerator="cpu").run("127.0.0.1", arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
