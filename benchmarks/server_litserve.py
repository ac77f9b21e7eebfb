"""The server that serve.py compares ours with: LitServe and transformers, put together as LitServe's guides do.

`OpenAISpec` in front of `generate`, streaming, in dynamic batches (`max_batch_size`, `batch_timeout`): what waits is
answered together, and what comes later waits for all of them.
"""

from __future__ import annotations

import argparse
import queue
import threading
from collections.abc import Iterator
from typing import Any

import litserve as ls
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.streamers import BaseStreamer


class RowStreamer(BaseStreamer):
    """The tokens of a whole batch, step by step; transformers' own streamers take one prompt only."""

    def __init__(self) -> None:
        self.rows: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.rows.put(value.tolist())
        self._prompt_seen = True

    def end(self) -> None:
        self.rows.put(None)

    def __iter__(self) -> Iterator[list[int]]:
        while (row := self.rows.get()) is not None:
            if isinstance(row, BaseException):
                raise row
            yield row


class PlainAPI(ls.LitAPI):
    def __init__(self, model: str, dtype: str, **settings: Any) -> None:
        super().__init__(spec=ls.OpenAISpec(), **settings)
        self.path = model
        self.dtype = dtype

    def setup(self, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.path, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=getattr(torch, self.dtype)).eval()
        # No token ends an answer, as with `ignore_eos`, which LitServe's request does not have.
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=self.tokenizer.pad_token_id)

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def unbatch(self, output: Any) -> Any:
        return output

    def predict(self, inputs: list[Any], context: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        chats = [[{"role": one.role, "content": one.content} for one in request.messages] for request in inputs]
        given = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        lengths = [request.max_tokens or 16 for request in inputs]
        sizes = given["attention_mask"].sum(1).tolist()
        streamer = RowStreamer()
        threading.Thread(target=self._generate, args=(given, max(lengths), streamer), daemon=True).start()
        for count, row in enumerate(streamer, 1):
            yield [
                {
                    "role": "assistant",
                    "content": self.tokenizer.decode([token]) if count <= length else None,
                    "prompt_tokens": size,
                    "completion_tokens": min(count, length),
                    "total_tokens": size + min(count, length),
                }
                for token, length, size in zip(row, lengths, sizes, strict=True)
            ]

    def _generate(self, given: Any, most: int, streamer: RowStreamer) -> None:
        try:
            with torch.inference_mode():
                self.model.generate(**given, max_new_tokens=most, streamer=streamer)
        except BaseException as error:
            streamer.rows.put(error)
            raise

    def encode_response(self, output: Any, context: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        yield from output


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--served-model-name", help="LitServe lets clients call it what they like")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    arguments = parser.parse_args()
    api = PlainAPI(arguments.model, arguments.dtype, max_batch_size=arguments.max_num_seqs, batch_timeout=0.05)
    server = ls.LitServer(api, accelerator="cpu", timeout=600)
    server.run("127.0.0.1", arguments.port, generate_client_file=False, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
