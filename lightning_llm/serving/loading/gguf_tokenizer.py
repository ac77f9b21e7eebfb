"""The tokenizer inside a `.gguf` file, as a `tokenizers.Tokenizer`: the vocabulary is there, while what splits a text
before is only named. The names and what they stand for are llama.cpp's (src/llama-vocab.cpp).
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.loading.gguf_file import GGUFFile

log = logging.getLogger(__name__)

_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2  # of `tokenizer.ggml.token_type`

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)


class _Splitting(NamedTuple):
    """How a text is cut before byte pairs are merged.

    Attributes:
        regex: Of the pieces; None: GPT-2's, which `ByteLevel` has built in.
        digits: Every digit is a piece of its own.
        add_bos: Whether the text begins with the bos token, where the file does not say.
        whole_words: A piece that is in the vocabulary is not looked at further.
        nfc: Texts are brought into Unicode's composed form first.
    """

    regex: str | None = None
    digits: bool = False
    add_bos: bool = False
    whole_words: bool = False
    nfc: bool = False


_GPT2 = _Splitting()
_DIGITS = _Splitting(digits=True)
_LLAMA3 = _Splitting(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}{_REST}", add_bos=True, whole_words=True)
_QWEN2 = _Splitting(rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{_REST}", nfc=True)
_TEKKEN = _Splitting(
    _CASED_WORDS % ("", "") + r"|\p{N}" + _REST_WITH_SLASH,
    add_bos=True,
    whole_words=True,
)
_GPT4O = _Splitting(
    _CASED_WORDS % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _REST_WITH_SLASH,
)
PRE_TOKENIZERS: dict[str, _Splitting] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "jais", "trillion", "default"), _GPT2),
    "olmo": _GPT2._replace(nfc=True),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3._replace(add_bos=False, whole_words=False)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "stablelm2": _QWEN2._replace(nfc=False),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}

# Tokens that end a text or a turn, which files often do not list with their `eos_token_id`; llama.cpp knows them too.
_END_TOKENS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "</s>",
)


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer of the file, ready to be saved as `tokenizer.json`.

    Raises:
        ConfigurationError: There is none, or it is of a kind that is not known here.
    """
    tokens = file.value("tokenizer.ggml.tokens")
    if not tokens:
        raise ConfigurationError(f"{file.path} has no vocabulary (tokenizer.ggml.tokens): it cannot be served.")
    kind = file.value("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(file, tokens)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(file, tokens), True
    else:
        raise ConfigurationError(
            f"{file.path} has a tokenizer of kind {kind!r}; gpt2 (byte-level BPE) and llama (SentencePiece) are known."
        )
    _add_tokens(tokenizer, tokens, file.value("tokenizer.ggml.token_type") or [])
    bos, eos = special_token(file, "bos"), special_token(file, "eos")
    begins = file.value("tokenizer.ggml.add_bos_token", add_bos) and bos is not None
    ends = file.value("tokenizer.ggml.add_eos_token", False) and eos is not None
    if begins or ends:
        _frame(tokenizer, bos if begins else None, eos if ends else None)
    return tokenizer


def special_token(file: GGUFFile, name: str) -> str | None:
    """The text of the file's "bos", "eos", "unknown", "padding" or "eot" token."""
    tokens, token = file.value("tokenizer.ggml.tokens"), file.value(f"tokenizer.ggml.{name}_token_id")
    return tokens[token] if token is not None and 0 <= token < len(tokens) else None


def end_token_ids(file: GGUFFile) -> list[int]:
    """All tokens that end a text or a turn, the file's own first."""
    tokens = file.value("tokenizer.ggml.tokens")
    types = file.value("tokenizer.ggml.token_type") or [_CONTROL] * len(tokens)
    named = [file.value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known = [token for token, text in enumerate(tokens) if text in _END_TOKENS and types[token] == _CONTROL]
    return list(dict.fromkeys(token for token in (*named, *known) if token is not None))


def _byte_level(file: GGUFFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    name = file.value("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ConfigurationError(
            f"{file.path} says that its texts are split as {name!r} (tokenizer.ggml.pre), which is not known here; "
            f"known are {', '.join(PRE_TOKENIZERS)}. Use the model's Hugging Face folder: its tokenizer.json says how."
        )
    if name == "default":
        log.warning(
            "%s does not say how its texts are split (tokenizer.ggml.pre): taken to be as for GPT-2.", file.path
        )
    splitting = PRE_TOKENIZERS[name]
    merges = [_pair(line) for line in file.value("tokenizer.ggml.merges") or []]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting.whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.digits else []
    if splitting.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.regex), "isolated"))
    space = bool(file.value("tokenizer.ggml.add_space_prefix", False))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=splitting.regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, splitting.add_bos


def _pair(line: str) -> tuple[str, str]:
    left, _, right = line.partition(" ")
    return left, right


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    """Byte pairs are merged in the order of the scores of what they make, as llama.cpp does and SentencePiece did."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    scores = file.value("tokenizer.ggml.scores") or [-float(number) for number in range(len(tokens))]
    types = file.value("tokenizer.ggml.token_type") or [1] * len(tokens)
    mergeable = {token for token, kind in zip(tokens, types, strict=True) if kind not in (_CONTROL, _UNKNOWN)}
    ranked = []
    for token in mergeable:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-scores[vocabulary[token]], vocabulary[left], vocabulary[right], left, right))
    ranked.sort()
    unknown = special_token(file, "unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for *_, left, right in ranked],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(file.value("tokenizer.ggml.add_space_prefix", True))
    spaces = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip],
    )
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in a text before it is split; control tokens are left out of decoded text, too."""
    added = [
        AddedToken(token, special=kind in (_CONTROL, _UNKNOWN), normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    ]
    tokenizer.add_tokens(added)


def _frame(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    single = " ".join(filter(None, (bos and f"{bos}:0", "$A:0", eos and f"{eos}:0")))
    pair = f"{single} " + " ".join(filter(None, (bos and f"{bos}:1", "$B:1", eos and f"{eos}:1")))
    named = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
    framing: Any = processors.TemplateProcessing(single=single, pair=pair, special_tokens=named)
    before = tokenizer.post_processor
    tokenizer.post_processor = framing if before is None else processors.Sequence([before, framing])
