"""The process that renders chat templates, for `chat_template.py`: a program of its own that imports Jinja and no more.

Templates come with models. Jinja's sandbox keeps them from reaching Python; it does not keep them from looping, nor
from `"a" * 10**9`, nor from what takes a minute inside one C function. So they are rendered here, in a process that may
use only so much memory, that can open and write no file, and that ends when a rendering has used up its processor time.

It reads lines of JSON, `{"template": ..., "variables": {...}, "seconds": ..., "characters": ...}`, and answers each
with `{"text": ...}` or `{"error": kind, "message": ...}`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MEMORY = 1 << 30  # bytes of address space; an interpreter with Jinja takes less than a tenth


class RefusalError(jinja2.TemplateError):
    """What a template says with `raise_exception`."""


class TooLongError(Exception):
    """More text came out than is allowed."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`, around what a model is to say: training masks by it, here it is as if it were not there."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What templates are written for: the environment of transformers' `apply_chat_template`."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_dict, namespace=Namespace)
    return made


class Namespace(jinja2.utils.Namespace):
    """Jinja's, but for names that begin with an underscore, which templates have no use for and attackers have."""

    def __init__(*args: Any, **attributes: Any) -> None:  # noqa: N805  `self` may be the name of an attribute
        self, *rest = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **attributes).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace cannot have an attribute {name!r}")
        super().__setitem__(name, value)


def _dict(*arguments: Any, **items: Any) -> dict[Any, Any]:
    """Makes one, and offers none of the class's own attributes."""
    return dict(*arguments, **items)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, which escapes what would matter in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise RefusalError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def render(templates: dict[str, jinja2.Template], request: dict[str, Any]) -> dict[str, str]:
    """The answer to one request."""
    text = request["template"]
    try:
        template = templates.get(text) or templates.setdefault(text, environment().from_string(text))
        parts, room = [], request["characters"]
        for part in template.generate(request["variables"]):
            room -= len(part)
            if room < 0:
                raise TooLongError
            parts.append(part)
        return {"text": "".join(parts)}
    except RefusalError as error:
        return {"error": "refused", "message": str(error)}
    except TooLongError:
        return {"error": "long", "message": ""}
    except MemoryError:
        return {"error": "memory", "message": ""}
    except jinja2.sandbox.SecurityError as error:
        return {"error": "unsafe", "message": str(error)}
    except Exception as error:  # the template's code may raise anything, and none of it may end this process
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answers requests until there are no more, or until one takes too long."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes our stdin when it ends
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is in the middle of
    templates: dict[str, jinja2.Template] = {}
    for warming in (
        "{{ strftime_now('%c') }}",
        "{{ none.none.none }}",
    ):  # imports what Jinja imports late, for errors too
        render(templates, {"template": warming, "variables": {}, "characters": 100})
    templates.clear()
    limits = {resource.RLIMIT_AS: MEMORY, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: 0}
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    print(json.dumps({"text": "ready"}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = json.dumps(render(templates, request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
