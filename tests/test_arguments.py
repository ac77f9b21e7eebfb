"""A function's signature is its command line: what is parsed is what the function takes."""

from __future__ import annotations

import inspect
from typing import Optional

import pytest

from lightning_llm.arguments import parser_of
from lightning_llm.cli import COMMANDS
from lightning_llm.registry.commands import COMMANDS as REGISTRY_COMMANDS


def bake(
    cake: str,
    *,
    layers: int,
    sweetness: float = 0.5,
    fillings: list[str] | None = None,
    oven_name: str | None = None,
    max_minutes: Optional[int] = None,  # noqa: UP045  the older spelling is an annotation too
    dry: bool = False,
) -> None:
    """Bake a cake.

    More about cakes than a help text wants to say.

    Args:
        cake: Which one.
        layers: How many, 100% of them edible.
        sweetness: Between 0 and 1.
        fillings: What goes between
            the layers.
        oven_name: By default the nearest.
        max_minutes: When to stop.
        dry: Only say what would be baked.
    """


def parse(*arguments: str) -> dict[str, object]:
    return vars(parser_of(bake).parse_args(arguments))


def test_arguments_arrive_in_the_functions_types() -> None:
    assert parse("tart", "--layers", "3") == {"cake": "tart", "layers": 3, "sweetness": 0.5, "dry": False}
    assert parse(
        *("--layers", "2", "--sweetness", "0.25", "--fillings", "jam", "cream", "--oven-name", "old"),
        *("--max-minutes", "40", "--dry", "--", "tart"),
    ) == {
        "cake": "tart",
        "layers": 2,
        "sweetness": 0.25,
        "fillings": ["jam", "cream"],
        "oven_name": "old",
        "max_minutes": 40,
        "dry": True,
    }


def test_what_is_left_out_is_left_to_the_functions_defaults() -> None:
    parsed = parse("tart", "--layers", "1")
    assert inspect.signature(bake).bind(**parsed)
    for name, parameter in inspect.signature(bake).parameters.items():
        if parameter.default is None:
            assert name not in parsed
        elif parameter.default is not parameter.empty:
            assert parsed[name] == parameter.default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "1"], "required: cake"),
        (["tart"], "required: --layers"),
        (["tart", "--layers", "many"], "--layers: invalid int value: 'many'"),
        (["tart", "--layers", "1", "--sweet", "1"], "unrecognized arguments: --sweet 1"),
        (["tart", "--layers", "1", "--fillings"], "--fillings: expected at least one argument"),
        (["tart", "--layers", "1", "--dry", "yes"], "unrecognized arguments: yes"),
    ],
)
def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "usage: lightning-llm bake",
        "Bake a cake.",
        "Which one.",
        "How many, 100% of them edible.",
        "Between 0 and 1. (default: 0.5)",
        "What goes between the layers.",
        "By default the nearest.",
    ):
        assert part in text, text
    assert "None" not in text and "More about cakes" not in text


@pytest.mark.parametrize(
    "command", [*COMMANDS.values(), *REGISTRY_COMMANDS.values()], ids=[*COMMANDS, *REGISTRY_COMMANDS]
)
def test_every_command_explains_all_its_arguments(command: object) -> None:
    parser = parser_of(command)  # type: ignore[arg-type]
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert actions.keys() == inspect.signature(command).parameters.keys()  # type: ignore[arg-type]
    assert all(action.help for action in actions.values())
    assert "None" not in parser.format_help()
