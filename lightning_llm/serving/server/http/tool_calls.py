"""Calls of tools in what a model writes: found as the text comes, so that a stream can pass them on piece by piece.

Models write calls as they were trained to. Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
Llama 3: an answer that is nothing but `{"name": ..., "parameters": {...}}`. Mistral: `[TOOL_CALLS]` and an array of
them or, lately, `[TOOL_CALLS]name{...}`. What a grammar enforces is an array of calls, or the arguments of one alone.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written.

    Attributes:
        name: vLLM's word for it.
        start: What comes before calls, wherever it is; empty: calls are all there is.
        end: After which there may be text again; empty: nothing but calls follows.
        between: What may stand before, between and after calls, beside space.
        name_first: Whether a call may also be a name and its arguments.
        special: Whether `start` is a special token, which is left out of texts unless asked for.
        id_length: Characters of a call's id.
    """

    name: str
    start: str = ""
    end: str = ""
    between: tuple[str, ...] = ()
    name_first: bool = False
    special: bool = False
    id_length: int = 29


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
LLAMA = ToolFormat("llama3_json", between=("<|python_tag|>", ";", ","))
MISTRAL = ToolFormat(  # its chat template asks for ids of 9
    "mistral", "[TOOL_CALLS]", between=("[TOOL_CALLS]", "[", "]", ","), name_first=True, special=True, id_length=9
)
ENFORCED = ToolFormat("enforced", between=("[", "]", ","))
FORMATS = {form.name: form for form in (HERMES, LLAMA, MISTRAL)}

_SPACE = " \t\r\n"
_HEAD = re.compile(r"[\w.-]*\s*(\[[\w\]]*)*\s*")  # a name, and what Mistral puts between it and the arguments
_LONGEST_HEAD = 256


@dataclass(frozen=True)
class CallPiece:
    """More of a call.

    Attributes:
        index: Which call of the answer.
        arguments: More of its arguments, as JSON text.
        id, name: With the first piece.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class CallScanner:
    """Reads one call as it comes: an object with `name` and `arguments` or `parameters`, or the arguments of a `name`.

    Attributes:
        raw: What was read.
        name: The function, once it is known.
        arguments: As much as there is of them.
        done: Whether the object has ended.
    """

    def __init__(self, name: str | None = None) -> None:
        self.raw = ""
        self.name = name
        self.arguments = ""
        self.done = False
        self._bare = name is not None
        self._depth = 0
        self._quoted = self._escaped = False
        self._token = ""  # the string or value at depth 1 that is being read
        self._key: str | None = None
        self._is_value = False

    def push(self, text: str) -> int:
        """Takes text up to the end of the object and returns how much of it that was."""
        for place, character in enumerate(text):
            self._take(character)
            if self.done:
                self.raw += text[: place + 1]
                return place + 1
        self.raw += text
        return len(text)

    def _take(self, character: str) -> None:
        before = self._depth
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._quoted = False
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.done = self._depth == 0
        if self._bare and (before or self._depth):
            self.arguments += character
        elif before and not self._bare:
            self._read(character, before)

    def _read(self, character: str, depth: int) -> None:
        """A character within the object, whose keys and values are told apart at depth 1."""
        plain = depth == 1 and not self._quoted
        if plain and self._is_value and (character == "," or self.done):
            self._end_value()
        elif plain and character == ":" and not self._is_value:
            self._key, self._token, self._is_value = _string(self._token), "", True
        elif self._token or character not in _SPACE + ",":
            self._token += character
            if self._is_value and self._key in ("arguments", "parameters") and self._token[0] == "{":
                if depth > 1 or character == "{":  # what follows the closing brace is not part of them
                    self.arguments += character

    def _end_value(self) -> None:
        if self._key == "name":
            self.name = _string(self._token)
        elif self._key in ("arguments", "parameters") and not self.arguments:
            self.arguments = _string(self._token) or "{}"  # a string of JSON, or null
        self._token, self._is_value = "", False


def _string(token: str) -> str | None:
    try:
        value = json.loads(token)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


class ToolCallParser:
    """Tells calls from the rest of an answer, as it comes.

    Args:
        form: How the model writes them.
        names: Of the functions that there are; anything else that looks like a call is text.
        forced: The one function whose arguments are all of the answer, as a grammar sees to.
        parallel: Whether there may be more than one call; further ones are dropped.

    Attributes:
        num_calls: Calls found.
    """

    def __init__(
        self, form: ToolFormat, names: Collection[str], *, forced: str | None = None, parallel: bool = True
    ) -> None:
        self.num_calls = 0
        self._form = form
        self._names = frozenset(names)
        self._parallel = parallel
        self._pending = ""  # not decided upon
        self._in_calls = not form.start
        self._opened = ""  # what was passed over since the text ended; text after all if no call follows
        self._scanner = None if forced is None else CallScanner(forced)
        self._announced = False
        self._sent = 0  # characters of the arguments
        self._text = ""  # that is certain, but not told yet
        self._space = ""  # at the end of the text; not worth telling if a call follows

    def push(self, text: str) -> Iterator[str | CallPiece]:
        """Takes text and gives what is certain: text, and pieces of calls."""
        self._pending += text
        waits = False
        while self._pending and not waits:
            if self._scanner is not None:
                yield from self._read_call(self._scanner)
            elif self._in_calls:
                waits = self._look_for_call()
            else:
                waits = self._look_for_start()
                yield from self._told()

    def finish(self) -> Iterator[str | CallPiece]:
        """The answer is over: what was held back is text, unless it is the rest of calls."""
        if self._scanner is not None and not self._announced:
            self._text += self._opened + self._scanner.raw
        elif self._in_calls and not self.num_calls:
            self._text += self._opened + self._pending
        elif not self._in_calls:
            self._text += self._pending
        self._pending = ""
        yield from self._told()
        if self._space and not self.num_calls:
            yield self._space

    def _told(self) -> Iterator[str]:
        text, self._text = self._space + self._text, ""
        kept = text.rstrip(_SPACE)
        self._space = text[len(kept) :]
        if kept:
            yield kept

    # -- what is pending: each takes some of it, or says that more must come --

    def _look_for_start(self) -> bool:
        start = self._form.start
        before, found, after = self._pending.partition(start) if start else (self._pending, "", "")
        if found:
            self._text, self._pending = self._text + before, after
            self._in_calls, self._opened = True, start
            return False
        held = _overlap(before, start)
        cut = len(before) - held
        self._text, self._pending = self._text + before[:cut], before[cut:]
        return True

    def _look_for_call(self) -> bool:
        end = self._form.end
        rest = self._pending.lstrip(_SPACE)
        self._pass_over(len(self._pending) - len(rest))
        if not rest or any(mark.startswith(rest) and mark != rest for mark in (*self._form.between, end)):
            return True
        for mark in self._form.between:
            if rest.startswith(mark):
                self._pass_over(len(mark))
                return False
        if end and rest.startswith(end):
            self._in_calls, self._opened, self._pending = False, "", rest[len(end) :]
            return False
        if rest[0] == "{":
            self._scanner = CallScanner()
            return False
        return self._look_for_name() if self._form.name_first else self._give_up()

    def _look_for_name(self) -> bool:
        head, brace, _ = self._pending.partition("{")
        name = head.partition("[")[0].strip()
        if len(head) > _LONGEST_HEAD or not _HEAD.fullmatch(head) or (brace and name not in self._names):
            return self._give_up()
        if brace:
            self._pass_over(len(head))
            self._scanner = CallScanner(name)
        return not brace

    def _pass_over(self, count: int) -> None:
        self._opened += self._pending[:count]
        self._pending = self._pending[count:]

    def _give_up(self) -> bool:
        """What follows is no call."""
        self._text += "" if self.num_calls else self._opened
        self._in_calls, self._opened = False, ""
        return False

    def _read_call(self, scanner: CallScanner) -> Iterator[str | CallPiece]:
        self._pending = self._pending[scanner.push(self._pending) :]
        if not self._announced and scanner.name in self._names and (scanner.arguments or scanner.done):
            self._announced, self._space = True, ""
            self.num_calls += 1
            if self._is_wanted:
                yield CallPiece(self.num_calls - 1, "", _call_id(self._form), scanner.name)
        if self._announced and self._is_wanted:
            arguments = scanner.arguments or ("{}" if scanner.done else "")
            if len(arguments) > self._sent:
                yield CallPiece(self.num_calls - 1, arguments[self._sent :])
                self._sent = len(arguments)
        if scanner.done:
            if not self._announced:
                self._opened += scanner.raw
                self._give_up()
                yield from self._told()
            self._scanner, self._announced, self._sent, self._opened = None, False, 0, ""

    @property
    def _is_wanted(self) -> bool:
        return self._parallel or self.num_calls == 1


def _overlap(text: str, start: str) -> int:
    """Characters at the end of a text that may be the beginning of `start`."""
    longest = min(len(start) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(start[:size])), 0)


def _call_id(form: ToolFormat) -> str:
    if form.id_length < 24:
        return secrets.token_hex(form.id_length)[: form.id_length]
    return "call_" + secrets.token_hex(12)
