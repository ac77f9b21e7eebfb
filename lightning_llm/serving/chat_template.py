"""`ChatTemplate`: a conversation -> the text that a model was trained to continue, by the Jinja template it came with.

`ModelTokenizer.apply_chat_template` calls it. What may come from a client is data; the template is the operator's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving import chat_renderer
from lightning_llm.serving.errors import RequestError

SECONDS = 0.5  # of processor time for one conversation
CHARACTERS = 8 << 20  # of the text that comes out
_PATIENCE = 20.0  # seconds of anyone's clock for a renderer that gets no processor
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")

# What the server says itself, so no client may.
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
_SPECIAL_TOKENS = frozenset(
    {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}
)


class ChatTemplate:
    """A model's chat template, or several by name, of which "tool_use" is for conversations with tools.

    It is rendered in a process of its own that starts with the first conversation (see `chat_renderer.py`), within
    `seconds` of processor time and to at most `characters`.

    Args:
        templates: Text, or name -> text with a "default".
        special_tokens: What `bos_token`, `eos_token`, ... stand for in it.
        origin: Where it comes from, for errors.

    Attributes:
        variables: What else it asks for, that a client may set, such as `enable_thinking`.

    Raises:
        ConfigurationError: A template is not Jinja.
    """

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        *,
        origin: str = "the chat template",
        seconds: float = SECONDS,
        characters: int = CHARACTERS,
    ) -> None:
        self._templates = {"default": templates} if isinstance(templates, str) else dict(templates)
        self._special_tokens = dict(special_tokens or {})
        self._origin, self._seconds, self._characters = origin, seconds, characters
        self._renderer = _Renderer()
        self.variables = frozenset().union(*(self._names(text) for text in self._templates.values()))

    def _names(self, text: str) -> frozenset[str]:
        """Variables that a template reads and neither sets itself nor gets from us. It is not compiled for this: that
        would run its constant expressions in here."""
        environment = chat_renderer.environment()
        try:
            tree = environment.parse(text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigurationError(
                f"{self._origin} is not a Jinja template ({error.message}, line {error.lineno}): correct it, or give "
                "another with --chat-template FILE."
            ) from None
        first: dict[str, str] = {}
        for name in _in_order(tree):
            first.setdefault(name.name, name.ctx)
        # What is set before it is read is the template's own. What is read first may get a default only then, as in
        # `{% if date is not defined %}{% set date = "today" %}{% endif %}`.
        read = {name for name, context in first.items() if context == "load"}
        read -= {macro.name for macro in tree.find_all(jinja2.nodes.Macro)}
        return frozenset(read - _RESERVED - _SPECIAL_TOKENS - {"loop", "caller"} - environment.globals.keys())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: In OpenAI's form, content as the template takes it (mostly text).
            tools: Functions that the model may call, in OpenAI's form.
            add_generation_prompt: End with what begins the model's turn.
            variables: See the attribute; any others are refused.

        Raises:
            RequestError: The template refuses the conversation, cannot cope with it, or takes too long over it.
        """
        unknown = sorted(variables.keys() - self.variables)
        if unknown:
            raise RequestError(
                f"This model's chat template has no {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(sorted(self.variables)) or 'no settings'}.",
                param="chat_template_kwargs",
            )
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise RequestError(
                "This model answers only conversations with tools: its chat template has no part named 'default', only "
                f"{', '.join(self._templates)}. Send tools, or have the server started with --chat-template FILE.",
                param="messages",
            )
        known = {**self._special_tokens, **variables, "messages": messages}
        known |= {"tools": tools or None, "add_generation_prompt": add_generation_prompt}
        request: dict[str, Any] = {"template": self._templates[name], "variables": known}
        request |= {"seconds": self._seconds, "characters": self._characters}
        try:
            line = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages and tools must be plain JSON: {error}.", param="messages") from None
        answer = self._renderer.ask(line)
        if "text" in answer:
            return answer["text"]
        raise RequestError(self._explain(answer["error"], answer["message"].rstrip(".")), param="messages")

    def _explain(self, kind: str, message: str) -> str:
        match kind:
            case "refused":
                return f"The model's chat template refuses these messages: {message}."
            case "long":
                return f"The model's chat template makes more than {self._characters} characters of these messages."
            case "memory":
                return "The model's chat template takes too much memory over these messages."
            case "time":
                return f"The model's chat template takes more than {self._seconds:g} s over these messages."
            case "unsafe":
                return f"The model's chat template does something that is not allowed: {message}."
        return f"The model's chat template cannot render these messages ({message})."

    def close(self) -> None:
        """Ends the process that renders; the next conversation starts another."""
        self._renderer.close()


def _in_order(node: jinja2.nodes.Node) -> Iterator[jinja2.nodes.Name]:
    """Names as they are met when a template runs: the value of an assignment before its target."""
    if isinstance(node, jinja2.nodes.Name):
        yield node
    children = list(node.iter_child_nodes())
    if isinstance(node, jinja2.nodes.Assign):
        children.reverse()
    for child in children:
        yield from _in_order(child)


class _Renderer:
    """A process that runs `chat_renderer.py`, one conversation at a time; it is started again when it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, line: str) -> dict[str, str]:
        with self._lock:
            if self._process is None or self._owner != os.getpid():  # a pipe is not for two processes
                self._start()
            answer = self._exchange(line)
            if answer is None:
                self._stop()
            return answer or {"error": "time", "message": ""}

    def _exchange(self, line: str) -> dict[str, str] | None:
        """The answer; None where the process ended without one, which it does when its time is over."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        alarm = threading.Timer(_PATIENCE, process.kill)
        alarm.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            received = process.stdout.readline()
        except BrokenPipeError:
            received = ""
        finally:
            alarm.cancel()
        return json.loads(received) if received else None

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(chat_renderer.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
        self._process, self._owner = process, os.getpid()
        weakref.finalize(self, _end, process, self._owner)
        assert process.stdout is not None
        if not process.stdout.readline():
            self._process = None
            raise ConfigurationError(
                f"What renders chat templates does not start: `{sys.executable} -P {chat_renderer.__file__}` says why."
            )

    def _stop(self) -> None:
        if self._process is not None:
            _end(self._process, self._owner)
        self._process = None

    def close(self) -> None:
        with self._lock:
            self._stop()


def _end(process: subprocess.Popen[str], owner: int) -> None:
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # what was not read by then is not wanted
                continue
