"""A command's signature and docstring as a command line: `max_tokens: int = 100` becomes `--max-tokens MAX_TOKENS`.

cli.py uses it for the commands that are plain functions; LightningCLI has its own parser.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse, parse_from_object


def parse_arguments(command: Callable[..., Any], arguments: Sequence[str], name: str | None = None) -> dict[str, Any]:
    """What to call a command with, from its command line; wrong ones end the program with 2 and a usage.

    Args:
        command: See `parser_of`.
        arguments: The words behind its name.
        name: How the command is called behind `lightning-llm`; by default as the function.
    """
    values = vars(parser_of(command, name).parse_args(arguments))
    for parameter, annotation in get_type_hints(command).items():
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            fields = {field.name for field in dataclasses.fields(annotation)} & values.keys()
            values[parameter] = annotation(**{field: values.pop(field) for field in fields})
    return values


USAGE_ERROR = 2


def run_group(group: str, commands: Mapping[str, Callable[..., int | None]], arguments: Sequence[str]) -> int:
    """Runs the command of a group that the first word names; lists them where that is none.

    Args:
        group: Its name behind `lightning-llm`.
        commands: By their names in it.
        arguments: The words behind the group's name.

    Returns:
        The exit code: what the command returns, 0 for None; 2 for an unknown one.
    """
    usage = [f"usage: lightning-llm {group} COMMAND [arguments]    (... COMMAND --help tells more)", ""]
    usage += [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("\n".join(usage))
        return 0
    name = arguments[0]
    if name not in commands:
        print("\n".join([f"lightning-llm {group}: there is no command {name!r}", "", *usage]), file=sys.stderr)
        return USAGE_ERROR
    return commands[name](**parse_arguments(commands[name], arguments[1:], f"{group} {name}")) or 0


def parser_of(command: Callable[..., Any], name: str | None = None) -> argparse.ArgumentParser:
    """The parser of `parse_arguments`.

    Args:
        command: Annotated with str, int, float, bool, a Literal of words, one of these or None or a word, list[str],
            or a dataclass, whose fields of such types become options of their own. Keyword-only parameters become
            options, the others are given by their place.
        name: How the command is called behind `lightning-llm`; by default as the function.
    """
    doc = parse(command.__doc__ or "")
    help_of = {parameter.arg_name: parameter.description or "" for parameter in doc.params}
    hints = get_type_hints(command)
    parser = argparse.ArgumentParser(
        prog=f"lightning-llm {name or command.__name__.rstrip('_')}",
        description=doc.short_description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for parameter_name, parameter in inspect.signature(command).parameters.items():
        annotation = hints[parameter_name]
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            _add_fields(parser.add_argument_group(help_of[parameter_name].rstrip(".")), annotation)
            continue
        options = _options(annotation, parameter.default, help_of.get(parameter_name, ""), parameter_name)
        if parameter.kind is not parameter.KEYWORD_ONLY:
            parser.add_argument(parameter_name, **options)
        else:
            options["required"] = parameter.default is parameter.empty
            parser.add_argument("--" + parameter_name.replace("_", "-"), **options)
    return parser


def _add_fields(group: argparse._ArgumentGroup, settings: type) -> None:
    """A dataclass's fields as options; those that no command line can give are left out."""
    help_of = {field.arg_name: field.description or "" for field in parse_from_object(settings).params}
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if field.default is not dataclasses.MISSING:
            options = _options(hints[field.name], field.default, help_of.get(field.name, ""), field.name)
            group.add_argument("--" + field.name.replace("_", "-"), **options)


def _options(annotation: Any, default: Any, text: str, name: str) -> dict[str, Any]:
    """What argparse must know of one argument."""
    # argparse formats help with %, and a docstring may speak of 5%.
    options: dict[str, Any] = {"help": " ".join(text.split()).replace("%", "%%")}
    kinds, words = _kinds_of(annotation)
    if kinds == [bool]:
        return options | {
            "action": argparse.BooleanOptionalAction if default is True else "store_true",
            "default": default,
        }
    if default is inspect.Parameter.empty or default is None:
        # A default of None means "decided later": the help text says how, so argparse need not.
        options["default"] = argparse.SUPPRESS
    else:
        options["default"] = default
    [kind] = kinds or [str]
    if get_origin(kind) is list:
        # --alias a --alias b is --alias a b
        return options | {"action": "extend", "nargs": "+", "type": get_args(kind)[0], "metavar": name.upper()}
    if words and not kinds:
        return options | {"choices": words}
    return options | {"type": _word_or(kind, words) if words else kind}


def _kinds_of(annotation: Any) -> tuple[list[Any], list[str]]:
    """The types that an annotation allows, None left out, and the words."""
    if get_origin(annotation) is Literal:
        return [], list(get_args(annotation))
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation], []
    kinds: list[Any] = []
    words: list[str] = []
    for part in get_args(annotation):
        if part is not type(None):
            more_kinds, more_words = _kinds_of(part)
            kinds += more_kinds
            words += more_words
    return kinds, words


def _word_or(kind: Callable[[str], Any], words: list[str]) -> Callable[[str], Any]:
    """A parser for a number or one of a few words."""

    def parse_value(text: str) -> Any:
        return text if text in words else kind(text)

    parse_value.__name__ = f"{kind.__name__} or {' or '.join(words)}"  # argparse calls it so in its error
    return parse_value
