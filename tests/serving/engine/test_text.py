"""Text as it comes: its pieces make up the whole, whatever the tokenizer, and nothing of a stop text is ever sent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lightning_llm.data.tokenizer import END_OF_TEXT, train_tokenizer
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.engine.text import StopTexts, TextStream
from lightning_llm.serving.engine.vocabulary import Vocabulary, vocabulary_of


def byte_level() -> Tokenizer:
    return train_tokenizer(["the stop of all words, über die Wörter, 世界 and 🎉🎊 then the end"] * 3, 330)


def sentencepiece() -> Tokenizer:
    """As Llama 2's: spaces are ▁, what is not known is bytes, and a leading space falls away."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁st", "op", "é", "a"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: id_ for id_, word in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>"
        )
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    words = ["<unk>", "▁the", "▁stop", "s", "▁", "é"]
    tokenizer = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "the", "stop", "##s", "##ping", ",", "über"]
    tokenizer = Tokenizer(models.WordPiece({word: id_ for id_, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def no_decoder() -> Tokenizer:
    return Tokenizer(models.WordLevel({"the": 0, "stop": 1, "<unk>": 2}, unk_token="<unk>"))


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece()


def stream_text(
    tokenizer: Tokenizer, tokens: list[int], prompt: list[int], sizes: list[int] | None = None, **params: Any
) -> tuple[list[str], TextStream]:
    """The pieces that come of pushing so many tokens at a time (one, without `sizes`), and then finishing."""
    stream = TextStream(tokenizer, SamplingParams(max_tokens=None, **params), prompt)
    pieces, start, turn = [], 0, 0
    while start < len(tokens):
        size = sizes[turn % len(sizes)] if sizes else 1
        pieces.append(stream.push(tokens[start : start + size]))
        start, turn = start + size, turn + 1
    return [*pieces, stream.finish()], stream


def cut_at_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Where a reader who goes by the character would stop: at the first end of a stop text, the longest if several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("make", [byte_level, sentencepiece, metaspace, wordpiece, no_decoder])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_pieces_make_up_what_the_tokenizer_decodes(make: Any, data: st.DataObject) -> None:
    tokenizer = {byte_level: BYTE_LEVEL, sentencepiece: SENTENCEPIECE}.get(make) or make()
    ids = st.integers(0, tokenizer.get_vocab_size() - 1)
    if make is sentencepiece:
        # This decoder turns a run of bytes with a bad one among them into U+FFFD for every byte, also for those that
        # were good text and are long sent. So here only bytes that are whole characters.
        character = st.characters(exclude_categories=["Cs"]).map(
            lambda one: [3 + byte for byte in one.encode()]  # the byte tokens come after three special ones
        )
        ids_lists = st.lists(st.one_of(character, st.integers(259, 264).map(lambda id_: [id_]), st.just([1])))
        tokens, prompt = (sum(data.draw(ids_lists), []) for _ in range(2))
    else:
        tokens, prompt = data.draw(st.lists(ids, max_size=40)), data.draw(st.lists(ids, max_size=5))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    before = tokenizer.decode(prompt).rstrip("\ufffd")
    whole = tokenizer.decode(prompt + tokens)
    pieces, stream = stream_text(tokenizer, tokens, prompt, sizes)
    if tokenizer.decode(prompt).endswith("\ufffd"):
        assert whole.endswith(
            "".join(pieces)
        )  # the prompt's last bytes belong to the answer if they become a character
    else:
        assert before + "".join(pieces) == whole
    assert stream.num_tokens == len(tokens)


WORDS = st.one_of(st.text(max_size=8), st.sampled_from(["stop", "st", "the ", "世界", "🎉", "aaaa", "aab"]))


@given(
    texts=st.lists(WORDS, max_size=12),
    stops=st.lists(
        st.one_of(st.text(min_size=1, max_size=5), st.sampled_from(["stop", "top ", "界", "aab", "🎉st"])), max_size=4
    ),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    include=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_text_ends_at_the_first_stop(texts: list[str], stops: list[str], sizes: list[int], include: bool) -> None:
    text = "".join(texts).encode(errors="replace").decode()
    tokens = BYTE_LEVEL.encode(text).ids
    expected, reason = cut_at_stop(text, stops, include)
    pieces, stream = stream_text(
        BYTE_LEVEL, tokens, [], sizes, stop=tuple(stops), include_stop_str_in_output=include, skip_special_tokens=False
    )
    assert ("".join(pieces), stream.stop_reason) == (expected, reason)
    # Whoever reads along never sees more than what stays.
    for end in range(len(pieces)):
        assert expected.startswith("".join(pieces[:end]))


@given(
    text=st.text(max_size=30), stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=4)
)
@settings(max_examples=100, deadline=None)
def test_as_much_is_sent_as_can_be(text: str, stops: list[str]) -> None:
    """What is held back at any time is the longest end of the text that begins a stop text, and no more."""
    finder, state = StopTexts(stops), 0
    for end in range(1, len(text) + 1):
        state = finder.step(state, text[end - 1])
        beginnings = [k for k in range(end + 1) if any(stop.startswith(text[end - k : end]) for stop in stops)]
        assert finder.depth[state] == max(beginnings)


def test_a_character_comes_whole() -> None:
    tokens = BYTE_LEVEL.encode("a𝄞b").ids
    pieces, _ = stream_text(BYTE_LEVEL, tokens, [])
    assert pieces == ["a", "", "", "", "𝄞", "b", ""]


def test_an_unfinished_character_is_flushed_at_the_end() -> None:
    first = BYTE_LEVEL.encode("𝄞").ids[0]
    assert stream_text(BYTE_LEVEL, [first], [])[0] == ["", "\ufffd"]
    # Bytes that can be no character do not pile up until one comes.
    assert "".join(stream_text(BYTE_LEVEL, [first] * 50, [])[0][:-1]) == "\ufffd" * 49


def test_a_prompt_may_end_within_a_character() -> None:
    tokens = BYTE_LEVEL.encode("𝄞").ids
    assert stream_text(BYTE_LEVEL, tokens[2:], [1, *tokens[:2]])[0] == ["", "𝄞", ""]


def test_a_leading_space_depends_on_the_prompt() -> None:
    the = SENTENCEPIECE.token_to_id("▁the")
    assert stream_text(SENTENCEPIECE, [the, the], [])[0] == ["the", " the", ""]
    assert stream_text(SENTENCEPIECE, [the], [SENTENCEPIECE.token_to_id("<s>")])[0] == ["the", ""]
    assert stream_text(SENTENCEPIECE, [the], [the])[0] == [" the", ""]


def test_special_tokens_are_shown_only_if_asked_for() -> None:
    tokens = [BYTE_LEVEL.token_to_id(END_OF_TEXT), *BYTE_LEVEL.encode("a").ids]
    assert "".join(stream_text(BYTE_LEVEL, tokens, [])[0]) == "a"
    assert "".join(stream_text(BYTE_LEVEL, tokens, [], skip_special_tokens=False)[0]) == END_OF_TEXT + "a"
    assert stream_text(BYTE_LEVEL, [10**6], [])[0] == ["", ""]  # rows of the model beyond the tokenizer


def test_a_stop_counts_after_min_tokens() -> None:
    tokens = BYTE_LEVEL.encode("xxx").ids
    assert len(tokens) == 3
    pieces, stream = stream_text(BYTE_LEVEL, tokens, [], stop=("x",), min_tokens=1)
    assert (pieces, stream.stop_reason) == (["x", "", "", ""], "x")


def test_tokens_after_the_stop_do_not_count() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop=("x",)), [])
    assert stream.push(BYTE_LEVEL.encode("QxQQ").ids) == "Q"
    assert stream.num_tokens == 2
    assert (stream.push([5]), stream.finish()) == ("", "")


def test_tokens_as_bytes() -> None:
    vocabulary = vocabulary_of(BYTE_LEVEL)
    assert vocabulary_of(BYTE_LEVEL) is vocabulary
    tokens = BYTE_LEVEL.encode("𝄞 ü").ids
    assert b"".join(map(vocabulary.bytes_of, tokens)).decode() == "𝄞 ü"
    assert vocabulary.bytes_of(BYTE_LEVEL.token_to_id(END_OF_TEXT)) == END_OF_TEXT.encode()
    assert (vocabulary.bytes_of(10**6), vocabulary.bytes_of(-1)) == (b"", b"")
    assert Vocabulary(SENTENCEPIECE).bytes_of(3 + 0xF0) == b"\xf0"
