"""`LLM`: the engine in your own process, for many prompts at once and no server."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from lightning_llm.data.tokenizer import TOKENIZER_FILE
from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.config import EngineConfig
from lightning_llm.serving.engine.engine import Engine, Pooling
from lightning_llm.serving.engine.outputs import Completion, RequestOutput, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.loading import load_model
from lightning_llm.serving.loading.folder import GENERATION_FILE
from lightning_llm.serving.tokenizer import CONFIG_FILE, TEMPLATE_FILE, TEMPLATES_FOLDER

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]

# What a model's folder has besides its weights and sizes.
_WORDS = (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE, GENERATION_FILE)


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
        self._chat_template = None if chat_template is None else Path(chat_template).read_text(encoding="utf-8")
        self.default_params = SamplingParams(**loaded.generation_defaults)
        self.engine = Engine(
            loaded.decoder, loaded.tokenizer.backend, config, eos_token_ids=loaded.tokenizer.eos_token_ids
        )
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts. An answer ends with the model's context at the latest, by "length".

        Args:
            prompts: A text or token ids, or several of them; `{"prompt": ...}` and `{"prompt_token_ids": ...}` too.
            sampling_params: How to answer, for all or for each; None: as the model's makers say.
            priority: Of each; lower comes first, where the engine's policy says so.

        Returns:
            An output for each prompt, in their order. One that could not be computed ends by "error" and tells in
            `error` why; the others are whole.

        Raises:
            RequestError: A prompt cannot be answered as it stands; none of them was.
        """
        read = [self._read(place, prompt) for place, prompt in enumerate(_several(prompts))]
        each = _params_of_each(sampling_params, self.default_params, len(read))
        order = [0] * len(read) if priority is None else list(priority)
        if len(order) != len(read):
            raise RequestError(
                f"There are {len(read)} prompts and {len(order)} priorities: give one for each.", param="priority"
            )
        outputs: dict[str, RequestOutput] = {}
        asked: list[_Asked] = []
        for (text, ids), params, rank in zip(read, each, order, strict=True):
            one = _Asked(str(next(self._numbers)), ids, self._clipped(params, len(ids)), rank)
            asked.append(one)
            outputs[one.name] = RequestOutput(one.name, text, ids, [Completion(index) for index in range(params.n)])

        def take(update: Update) -> None:
            output = outputs[update.request_id]
            output.outputs[update.index].add(update)
            output.prompt_logprobs = update.prompt_logprobs or output.prompt_logprobs
            if update.usage is not None:
                output.num_cached_tokens = update.usage.cached_tokens

        self._run(asked, take)
        return list(outputs.values())

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers conversations, one or several, written out by the model's chat template.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`, or several such.
            sampling_params: As of `generate`.
            **template: Further arguments of `ModelTokenizer.apply_chat_template`, such as `tools`.

        Raises:
            RequestError: The model has no chat template, or it cannot write the conversation out.
        """
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        texts = [self.tokenizer.apply_chat_template(one, **template) for one in conversations]
        outputs = self.generate([self._encode(text, add_special_tokens=False) for text in texts], sampling_params)
        for output, text in zip(outputs, texts, strict=True):
            output.prompt = text
        return outputs

    def embed(self, prompts: Prompt | Sequence[Prompt], *, pooling: Pooling = "mean") -> list[list[float]]:
        """A vector of length 1 for each prompt: its last hidden states' "mean", or the "last" of them.

        Raises:
            RequestError: A prompt cannot be taken as it stands.
            RuntimeError: One of them could not be computed.
        """
        read = [self._read(place, prompt) for place, prompt in enumerate(_several(prompts))]
        asked = [_Asked(str(next(self._numbers)), ids, SamplingParams(max_tokens=1)) for _, ids in read]
        vectors: dict[str, list[float]] = {}

        def take(update: Update) -> None:
            if update.embedding is None:
                place = [one.name for one in asked].index(update.request_id)
                raise RuntimeError(f"Prompt {place} has no vector: {update.error or 'it was cut off'}")
            vectors[update.request_id] = update.embedding

        self._run(asked, take, pooling)
        return [vectors[one.name] for one in asked]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a folder that transformers and `LLM` load, with the files of the tokenizer that the model came with,
        and the chat template that it was given instead, if it was.

        Raises:
            ConfigurationError: The tokenizer's files are not there any more; nothing was written.
        """
        target = Path(folder)
        if not (self._folder / TOKENIZER_FILE).is_file():
            raise ConfigurationError(
                f"{self._folder}, where the model was loaded from, has no {TOKENIZER_FILE} any more: put it back."
            )
        self.decoder.save_pretrained(target)
        if not target.samefile(self._folder):
            for name in _WORDS:
                if (self._folder / name).is_file():
                    shutil.copyfile(self._folder / name, target / name)
            if (self._folder / TEMPLATES_FOLDER).is_dir():
                shutil.copytree(self._folder / TEMPLATES_FOLDER, target / TEMPLATES_FOLDER, dirs_exist_ok=True)
        if self._chat_template is not None:
            (target / TEMPLATE_FILE).write_text(self._chat_template, encoding="utf-8")
            shutil.rmtree(target / TEMPLATES_FOLDER, ignore_errors=True)  # which would go with the model's own
        return target

    def _run(self, asked: Sequence[_Asked], take: Callable[[Update], None], pooling: Pooling | None = None) -> None:
        """Has the engine answer all of these; whatever is raised meanwhile, none of them stays with it."""
        try:
            for one in asked:
                self.engine.add(one.name, one.prompt_ids, one.params, priority=one.priority, pooling=pooling)
            while self.engine.has_work:
                for update in self.engine.step():
                    take(update)
        finally:
            for one in asked:
                self.engine.abort(one.name)

    def _clipped(self, params: SamplingParams, prompt_tokens: int) -> SamplingParams:
        """With no more tokens than the context has room for behind the prompt; at least 1, for the engine to refuse."""
        room = max(1, self.engine.max_model_len - prompt_tokens)
        if params.max_tokens is None or params.max_tokens <= room:
            return params
        return replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))

    def _read(self, place: int, prompt: object) -> tuple[str | None, list[int]]:
        """The text, if it was given, and the token ids of a prompt."""
        text: object = prompt
        ids: object = prompt
        if isinstance(prompt, Mapping):
            if not prompt.keys() & {"prompt", "prompt_token_ids"} or prompt.keys() - {"prompt", "prompt_token_ids"}:
                raise RequestError(
                    f"Prompt {place} has {', '.join(map(str, prompt)) or 'nothing'}: it may have prompt and "
                    "prompt_token_ids.",
                    param="prompt",
                )
            text = prompt.get("prompt")
            ids = prompt.get("prompt_token_ids", text)
        if isinstance(ids, str):
            return ids, self._encode(ids)
        if not isinstance(ids, Sequence) or not all(_is_token(token) for token in ids):
            raise RequestError(
                f"Prompt {place} is neither a text nor a sequence of token ids: {ids!r:.80}.", param="prompt"
            )
        return text if isinstance(text, str) else None, [int(token) for token in ids]

    def _encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"A prompt has half a surrogate pair at character {error.start}, which is no text: {error}.",
                param="prompt",
            ) from None
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


@dataclass(frozen=True)
class _Asked:
    """A request as the engine takes it."""

    name: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[object]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts is a {type(prompts).__name__}, not a prompt or a list of them.", param="prompt")
    return [prompts] if prompts and _is_token(prompts[0]) else prompts


def _is_token(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's integers too


def _params_of_each(
    given: SamplingParams | Sequence[SamplingParams] | None, default: SamplingParams, count: int
) -> list[SamplingParams]:
    each = list(given) if isinstance(given, Sequence) else [default if given is None else given] * count
    if len(each) != count:
        raise RequestError(
            f"There are {count} prompts and {len(each)} sampling_params: give one for each, or one for all.",
            param="sampling_params",
        )
    for one in each:
        if not isinstance(one, SamplingParams):
            raise RequestError(f"sampling_params has {one!r:.80}, which is no SamplingParams.", param="sampling_params")
    return each
