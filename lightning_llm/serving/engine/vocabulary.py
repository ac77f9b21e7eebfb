"""What each token of a tokenizer is, as bytes: for text that grows by a token, for `logprobs`, and for grammars."""

from __future__ import annotations

import re
from functools import lru_cache

from tokenizers import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Any piece will do to show a decoder what a token looks like behind another: decoders look at pieces, not at ids.
_ANCHOR = "a"


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


class Vocabulary:
    """The bytes of each token.

    A text is the bytes of its tokens, one after the other, whatever the tokenizer is made of (byte-level BPE as in
    GPT-2, Llama 3 and Qwen; SentencePiece with a fallback to bytes as in Llama 2 and Gemma; WordPiece). What a token is
    may depend on whether it is the first, where a leading space falls away.

    Args:
        tokenizer: The tokenizer; tokens added to it later are not seen.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special_ids = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._anchor = self._decode([_ANCHOR])
        self._byte_level = self._decode(["Ā"]) == "\0"
        self._falls_back_to_bytes = self._decode(["<0x41>"]) == "A"
        self._inner: dict[int, bytes] = {}

    def bytes_of(self, token_id: int, *, first: bool = False) -> bytes:
        """What the token adds to a text; special tokens add what they are called, unknown ids nothing."""
        if first:
            return self._spell(token_id, first=True)
        known = self._inner.get(token_id)
        if known is None:
            known = self._inner[token_id] = self._spell(token_id, first=False)
        return known

    def _spell(self, token_id: int, *, first: bool) -> bytes:
        piece = self.tokenizer.id_to_token(token_id) if 0 <= token_id < self.size else None
        if piece is None:
            return b""
        if self._byte_level:
            spelled = [_BYTE_LEVEL.get(character) for character in piece]
            return piece.encode() if None in spelled else bytes(spelled)  # type: ignore[arg-type]
        if self._falls_back_to_bytes and (byte := _BYTE_PIECE.fullmatch(piece)) and int(byte[1], 16) >= 0x80:
            return bytes([int(byte[1], 16)])
        if first:
            return self._decode([piece]).encode()
        return self._decode([_ANCHOR, piece]).removeprefix(self._anchor).encode()

    def _decode(self, pieces: list[str]) -> str:
        decoder = self.tokenizer.decoder
        return " ".join(pieces) if decoder is None else decoder.decode(pieces)


@lru_cache(maxsize=8)
def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer, made once."""
    return Vocabulary(tokenizer)
