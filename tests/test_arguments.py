"""A function's signature is its command line: what is parsed is what the function takes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Literal, Optional, get_type_hints

import pytest

from lightning_llm.arguments import parse_arguments, parser_of
from lightning_llm.cli import COMMANDS
from lightning_llm.doctor.commands import doctor
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
    return parse_arguments(bake, arguments)


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
    "command",
    [*COMMANDS.values(), *REGISTRY_COMMANDS.values(), doctor],
    ids=[*COMMANDS, *REGISTRY_COMMANDS, "doctor"],
)
def test_every_command_explains_all_its_arguments(command: object) -> None:
    parser = parser_of(command)  # type: ignore[arg-type]
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    hints = get_type_hints(command)
    settings = [hints[name] for name in inspect.signature(command).parameters if dataclasses.is_dataclass(hints[name])]  # type: ignore[arg-type]
    fields = {field.name for one in settings for field in dataclasses.fields(one)}
    plain = inspect.signature(command).parameters.keys() - {n for n, hint in hints.items() if hint in settings}  # type: ignore[arg-type]
    assert plain <= actions.keys() <= plain | fields
    assert all(action.help for action in actions.values())
    assert "None" not in parser.format_help()


@dataclasses.dataclass(frozen=True)
class Oven:
    """An oven."""

    heat: float = 180.0
    """Degrees."""
    racks: int | Literal["auto"] = "auto"
    """How many; "auto": as
    many as fit."""
    light: bool = True
    """Whether it is lit."""
    mode: Literal["fan", "grill"] = "fan"
    """Where the heat comes from."""
    spare: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """What no command line can give."""


def roast(meat: str, *, oven: Oven, crisp: bool = True) -> None:
    """Roast.

    Args:
        meat: What.
        oven: The oven.
        crisp: Whether the skin is to crack.
    """


def test_a_dataclass_is_taken_apart_and_put_together_again() -> None:
    assert parse_arguments(roast, ["duck"]) == {"meat": "duck", "crisp": True, "oven": Oven()}
    given = ["duck", "--no-crisp", "--heat", "90", "--racks", "3", "--no-light", "--mode", "grill"]
    assert parse_arguments(roast, given) == {"meat": "duck", "crisp": False, "oven": Oven(90.0, 3, False, "grill")}
    assert parse_arguments(roast, ["duck", "--racks", "auto"])["oven"] == Oven()
    text = " ".join(parser_of(roast).format_help().split())
    for part in (
        "The oven: ",
        'How many; "auto": as many as fit. (default: auto)',
        "{fan,grill}",
        "--light, --no-light",
    ):
        assert part in text
    assert "spare" not in text


@pytest.mark.parametrize("wrong", [["--racks", "some"], ["--mode", "steam"], ["--spare", "1"], ["--heat", "hot"]])
def test_a_field_of_a_dataclass_takes_only_its_own_kind(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(roast, ["duck", *wrong])
    assert ended.value.code == 2 and wrong[0] in capsys.readouterr().err
