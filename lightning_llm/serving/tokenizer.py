"""`ModelTokenizer`: a served model's text <-> token ids, its chat template, and the tokens that end an answer.

Loading makes it; the engine, the server and `LLM` use it. No HTTP and no transformers in here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from lightning_llm.data.tokenizer import TOKENIZER_FILE, load_tokenizer, vocabulary_size
from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.chat_template import ChatTemplate
from lightning_llm.serving.engine.vocabulary import vocabulary_of
from lightning_llm.serving.errors import RequestError

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES_FOLDER = "additional_chat_templates"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ModelTokenizer:
    """A model's tokenizer.

    Args:
        tokenizer: Of the library `tokenizers`.
        special_tokens: "bos_token", "eos_token", ... -> text.
        chat_template: None where the model has none.
        eos_token_ids: Tokens that end an answer, beside the `eos_token`.

    Attributes:
        backend: The `tokenizers.Tokenizer`.
        chat_template: See above.
        eos_token_ids: Of all tokens that end an answer.
        bos_token_id: None where there is none.
        vocab_size: The largest id + 1.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        tokenizer.no_truncation()  # some files say how training cut and padded
        tokenizer.no_padding()
        self.backend = tokenizer
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        own = self._id_of("eos_token")
        self.eos_token_ids = frozenset(eos_token_ids) | (frozenset() if own is None else {own})
        self.bos_token_id = self._id_of("bos_token")
        self.vocab_size = vocabulary_size(tokenizer)

    def _id_of(self, name: str) -> int | None:
        return self.backend.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None

    @classmethod
    def load(
        cls, folder: str | Path, *, eos_token_ids: Iterable[int] = (), chat_template: str | Path | None = None
    ) -> ModelTokenizer:
        """The tokenizer of a Hugging Face folder: `tokenizer.json`, and what is there of `tokenizer_config.json`,
        `chat_template.jinja` and `additional_chat_templates/`.

        Args:
            folder: With these files, or the `tokenizer.json` beside which they are.
            eos_token_ids: What else ends an answer, from `config.json` and `generation_config.json`.
            chat_template: A file with a template to use instead of the model's.

        Raises:
            ConfigurationError: There is no `tokenizer.json`, or one of the files is damaged.
        """
        place = Path(folder)
        if place.name == TOKENIZER_FILE and place.is_file():
            place = place.parent
        if not (place / TOKENIZER_FILE).is_file():
            other = next((name for name in ("tokenizer.model", "vocab.json") if (place / name).is_file()), None)
            hint = (
                f" It has {other}, of which `AutoTokenizer.from_pretrained(...).save_pretrained(...)` of transformers "
            )
            raise ConfigurationError(
                f"{place} has no {TOKENIZER_FILE}, without which there is no text."
                + (
                    hint + f"makes a {TOKENIZER_FILE}."
                    if other
                    else " Copy it there, or say where it is with `tokenizer=`."
                )
            )
        tokenizer = load_tokenizer(place)
        settings = read_json(place / CONFIG_FILE)
        _add_tokens(tokenizer, settings.get("added_tokens_decoder"), place / CONFIG_FILE)
        named = {name: _content(settings[name]) for name in _SPECIAL_TOKENS if settings.get(name)}
        special_tokens = {name: token for name, token in named.items() if token is not None}
        texts, origin = _read_templates(place, settings, chat_template)
        template = ChatTemplate(texts, special_tokens, origin=origin) if texts else None
        return cls(tokenizer, special_tokens=special_tokens, chat_template=template, eos_token_ids=eos_token_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: Names of special tokens in it become these tokens, as in transformers.
            add_special_tokens: With the bos token in front, if the model's tokenizer says so. Not for the text of
                `apply_chat_template`, which has it already.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation, to be encoded with `add_special_tokens=False`; see `ChatTemplate.render`.

        Raises:
            RequestError: The model has no template, or it cannot render the conversation.
        """
        if self.chat_template is None:
            raise RequestError(
                "This model has no chat template, so it takes no messages: send a prompt to /v1/completions, or serve "
                "it with --chat-template FILE.",
                param="messages",
            )
        return self.chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for in a text, which need not be whole characters; none of an unused id."""
        return vocabulary_of(self.backend).bytes_of(token)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file.

    Raises:
        ConfigurationError: It is something else; the file is named.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not valid JSON ({error}): fetch it again.") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} holds a {type(content).__name__}, not an object: fetch it again.")
    return content


def _content(token: Any) -> str | None:
    """Of a token as a `tokenizer_config.json` has it: text, or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _add_tokens(tokenizer: Tokenizer, listed: Any, origin: Path) -> None:
    """Tokens that a `tokenizer_config.json` has beside `tokenizer.json`, as transformers adds them."""
    known = tokenizer.get_added_tokens_decoder()
    for number, token in sorted((int(number), token) for number, token in (listed or {}).items()):
        if number in known or _content(token) is None:
            continue
        flags = {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokenizer.add_tokens([AddedToken(token["content"], **flags)])
        if tokenizer.token_to_id(token["content"]) != number:
            raise ConfigurationError(
                f"{origin} says that token {number} is {token['content']!r}, but the tokenizer.json beside it has "
                f"{tokenizer.id_to_token(number)!r} there: they are not of the same model."
            )


def _read_templates(folder: Path, settings: Mapping[str, Any], chosen: str | Path | None) -> tuple[dict[str, str], str]:
    """Chat templates by name, and where they come from. Files go before what `tokenizer_config.json` has."""
    if chosen is not None:
        try:
            return {"default": Path(chosen).read_text(encoding="utf-8")}, str(chosen)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"The chat template {chosen} cannot be read: {error}.") from None
    file = folder / TEMPLATE_FILE
    if file.is_file():
        others = (folder / TEMPLATES_FOLDER).glob("*.jinja")
        found = {"default": file, **{other.stem: other for other in sorted(others)}}
        return {name: path.read_text(encoding="utf-8") for name, path in found.items()}, str(file)
    templates = settings.get("chat_template")
    if isinstance(templates, list):
        templates = {each["name"]: each["template"] for each in templates if {"name", "template"} <= each.keys()}
    elif isinstance(templates, str):
        templates = {"default": templates}
    return templates or {}, f"chat_template in {folder / CONFIG_FILE}"
