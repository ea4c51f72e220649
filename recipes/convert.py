"""Values of YAML and of the command line, turned into the annotated type of the setting they are meant for.

YAML reads `3e-3` as text, `no` as False and `5:30` as 330. Text is therefore converted by the type that is expected,
never by its looks, and a value of another type is refused instead of coerced.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

import yaml

from errors import RecipeError

_NOTHING = ("none", "null", "~")


def convert(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as an instance of `hint`.

    Args:
        value: What YAML gave, or the text of a command line override.
        hint: A type annotation: bool, int, float, str, Literal, Union, tuple, dict, or Any.
        key: The dotted name of the setting, for the message.

    Raises:
        RecipeError: `value` cannot be read as `hint`.
    """
    try:
        return _convert(value, hint)
    except (TypeError, ValueError):
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        hint_text = "one of " + ", ".join(map(str, choices)) if choices else spell(hint)
        raise RecipeError(f"{key}: expected {hint_text}, got {value!r}{suggestion(str(value), choices)}") from None


def _convert(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return yaml.safe_load(value) if isinstance(value, str) else value
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(value, arguments)
    if origin is typing.Literal:
        return arguments[[str(choice) for choice in arguments].index(str(value))]
    if origin in (tuple, list):
        return origin(_items(value, arguments))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError
        return {_convert(k, arguments[0]): _convert(v, arguments[1]) for k, v in value.items()}
    if hint is bool:
        return _boolean(value)
    if hint in (int, float):
        return _number(value, hint)
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise TypeError


def _first_that_fits(value: Any, options: Iterable[Any]) -> Any:
    options = list(options)
    if type(None) in options and (value is None or str(value).lower() in _NOTHING):
        return None
    for option in sorted(options, key=lambda option: option is str):  # any text is a str: try it last
        try:
            return _convert(value, option)
        except (TypeError, ValueError):
            continue
    raise TypeError


def _items(value: Any, arguments: tuple[Any, ...]) -> list[Any]:
    if isinstance(value, str):
        value = [item.strip() for item in value.strip("[]() ").split(",")] if value.strip("[]() ") else []
    if not isinstance(value, (list, tuple)):
        raise TypeError
    if len(arguments) == 2 and arguments[1] is Ellipsis or len(arguments) == 1:
        return [_convert(item, arguments[0]) for item in value]
    if arguments and len(arguments) != len(value):
        raise ValueError
    return [_convert(item, hint) for item, hint in zip(value, arguments, strict=True)] if arguments else list(value)


def _boolean(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise TypeError
    return str(value).lower() == "true"


def _number(value: Any, kind: type) -> int | float:
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    if kind is float:
        return number
    if not number.is_integer():
        raise ValueError
    return int(number)


def spell(hint: Any) -> str:
    """The annotation as one would write it in a doc-string."""
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(spell(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def suggestion(word: str, choices: Iterable[Any]) -> str:
    """`, did you mean 'x'?` for the nearest of the choices, or nothing."""
    near = difflib.get_close_matches(word, [str(choice) for choice in choices], n=1)
    return f", did you mean {near[0]!r}?" if near else ""
