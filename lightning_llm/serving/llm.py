"""`LLM`: the engine in your own process, for many prompts at once and no server."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.config import EngineConfig
from lightning_llm.serving.engine.engine import Engine, Pooling
from lightning_llm.serving.engine.outputs import Completion, RequestOutput, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.loading import load_model

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

# What a model's folder has besides its weights and sizes.
_WORDS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class LLM:
    """A model that answers prompts, as many at a time as there is room for.

        llm = LLM("runs/demo/model")
        for output in llm.generate(["def main(", "import "], SamplingParams(temperature=0, max_tokens=32)):
            print(output.prompt, output.text)

    Args:
        model: A Hugging Face folder, a checkpoint of a training run, a `.gguf` file, `s3://...`, or a name on the hub.
        dtype: Of the weights; "auto": as they are.
        device: None: a GPU if there is one.
        revision: Of a model on the hub.
        chat_template: A file to use instead of the model's template.
        **engine: Fields of `EngineConfig`, such as `kv_cache_blocks`, `max_num_seqs` and `enable_prefix_caching`.

    Attributes:
        engine: What does it; its `stats()` tell how.
        tokenizer: Text to tokens and back.
        name: Of the model.

    Raises:
        ConfigurationError: There is no such model, it is damaged, or the sizes do not fit.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        revision: str | None = None,
        chat_template: str | Path | None = None,
        **engine: Any,
    ) -> None:
        unknown = sorted(engine.keys() - EngineConfig.__dataclass_fields__.keys())
        if unknown:
            raise ConfigurationError(
                f"LLM has no setting {', '.join(unknown)}; it has {', '.join(EngineConfig.__dataclass_fields__)}."
            )
        config = EngineConfig(**engine)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_model(model, dtype=dtype, device=where, revision=revision, chat_template=chat_template)
        self.name = loaded.name
        self.decoder = loaded.decoder
        self.tokenizer = loaded.tokenizer
        self._folder = loaded.folder
        self.default_params = SamplingParams(**loaded.generation_defaults)
        self.engine = Engine(
            loaded.decoder, loaded.tokenizer.backend, config, eos_token_ids=loaded.tokenizer.eos_token_ids
        )
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts.

        Args:
            prompts: A text or token ids, or several of them.
            params: How to answer, for all or for each; None: as the model's makers say.
            priority: Of each; lower comes first, where the engine's policy says so.

        Returns:
            An output for each prompt, in their order.

        Raises:
            RequestError: A prompt cannot be answered as it stands; none of them was.
        """
        several = _several(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or self.default_params] * len(several)
        if len(each) != len(several):
            raise RequestError(f"There are {len(several)} prompts and {len(each)} params: give one for each, or one.")
        outputs = [
            RequestOutput(
                request_id=str(next(self._numbers)),
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt),
                outputs=[Completion(index) for index in range(one.n)],
            )
            for prompt, one in zip(several, each, strict=True)
        ]
        order = priority or [0] * len(outputs)
        added: list[str] = []
        try:
            for output, one, rank in zip(outputs, each, order, strict=True):
                self.engine.add(output.request_id, output.prompt_token_ids, one, priority=rank)
                added.append(output.request_id)
            self._run({output.request_id: output for output in outputs})
        except BaseException:
            for request_id in added:
                self.engine.abort(request_id)
            raise
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers conversations, one or several, written out by the model's chat template.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`, or several such.
            params: As of `generate`.
            **template: Further arguments of `ModelTokenizer.apply_chat_template`, such as `tools`.

        Raises:
            RequestError: The model has no chat template, or it cannot write the conversation out.
        """
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        texts = [self.tokenizer.apply_chat_template(one, **template) for one in conversations]
        outputs = self.generate([self.tokenizer.encode(text, add_special_tokens=False) for text in texts], params)
        for output, text in zip(outputs, texts, strict=True):
            output.prompt = text
        return outputs

    def embed(self, prompts: Prompt | Sequence[Prompt], *, pooling: Pooling = "mean") -> list[list[float]]:
        """A vector of length 1 for each prompt: its last hidden states' "mean", or the "last" of them."""
        ids = [self.tokenizer.encode(one) if isinstance(one, str) else list(one) for one in _several(prompts)]
        names = [str(next(self._numbers)) for _ in ids]
        for name, one in zip(names, ids, strict=True):
            self.engine.add(name, one, SamplingParams(max_tokens=1), pooling=pooling)
        vectors: dict[str, list[float]] = {}
        while self.engine.has_work:
            for update in self.engine.step():
                _raise_failure(update)
                vectors[update.request_id] = update.embedding or []
        return [vectors[name] for name in names]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a folder that transformers and `LLM` load."""
        self.decoder.save_pretrained(folder)
        for name in _WORDS:
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, Path(folder) / name)
        return Path(folder)

    def _run(self, outputs: dict[str, RequestOutput]) -> None:
        while self.engine.has_work:
            for update in self.engine.step():
                _raise_failure(update)
                output = outputs[update.request_id]
                output.outputs[update.index].add(update)
                output.prompt_logprobs = update.prompt_logprobs or output.prompt_logprobs
                if update.usage is not None:
                    output.num_cached_tokens = update.usage.cached_tokens


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _raise_failure(update: Update) -> None:
    if update.error is not None:
        raise RuntimeError(f"Request {update.request_id} failed: {update.error}")
