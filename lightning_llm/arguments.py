"""A command's signature and docstring as a command line: `max_tokens: int = 100` becomes `--max-tokens MAX_TOKENS`.

cli.py uses it for the commands that are plain functions; LightningCLI has its own parser.
"""

from __future__ import annotations

import argparse
import inspect
import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse


def parser_of(command: Callable[..., Any], name: str | None = None) -> argparse.ArgumentParser:
    """A parser for `command(**vars(parser.parse_args()))`.

    Args:
        command: Annotated with str, int, float, bool, list[str], or one of these or None. Keyword-only parameters
            become options, the others are given by their place.
        name: How the command is called behind `lightning-llm`; by default as the function.
    """
    doc = parse(command.__doc__ or "")
    help_of = {parameter.arg_name: parameter.description for parameter in doc.params}
    hints = get_type_hints(command)
    parser = argparse.ArgumentParser(
        prog=f"lightning-llm {name or command.__name__.rstrip('_')}",
        description=doc.short_description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for name, parameter in inspect.signature(command).parameters.items():
        # argparse formats help with %, and a docstring may speak of 5%.
        options: dict[str, Any] = {"help": (help_of.get(name) or "").replace("%", "%%")}
        required = parameter.default is parameter.empty
        annotation = _without_none(hints[name])
        if annotation is bool:
            options["action"] = "store_true"
        elif get_origin(annotation) is list:
            # --alias a --alias b is --alias a b
            options |= {"action": "extend", "nargs": "+", "type": get_args(annotation)[0], "metavar": name.upper()}
        else:
            options["type"] = annotation
        if parameter.kind is not parameter.KEYWORD_ONLY:
            parser.add_argument(name, **options)
        else:
            # A default of None means "decided later": the help text says how, so argparse need not.
            decided_later = required or parameter.default is None
            options |= {"required": required, "default": argparse.SUPPRESS if decided_later else parameter.default}
            parser.add_argument("--" + name.replace("_", "-"), **options)
    return parser


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        (kind,) = (kind for kind in get_args(annotation) if kind is not type(None))
        return kind
    return annotation
