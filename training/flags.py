"""Dataclasses of options to flags and back. In: option groups. Out: argparse flags, and groups built of JSON.

An option stands in one place: as a field of its group, described in the group's docstring. Its flag, type, choices and
help come from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from dpq_rec import ConfigError

T = TypeVar("T")
_METAVARS = {int: "N", float: "X", str: "TEXT"}


class Option(NamedTuple):
    """One option of a run.

    Attributes:
        group: description of the group that `--help` shows it in.
        path: where it stands in the configuration: ("embedding", "dpq", "num_codes").
        flag: its name on the command line, without dashes in front.
        kind: its type: bool, int, float, str, a Literal, a tuple of these, or one of them or None.
        text: what it does.
    """

    group: str
    path: tuple[str, ...]
    flag: str
    kind: Any
    text: str


def flag_of(field: dataclasses.Field[Any]) -> str:
    """A field's flag: its name, unless its metadata say another."""
    return str(field.metadata.get("flag", field.name)).replace("_", "-")


def options(
    kind: type, path: tuple[str, ...] = (), group: str = "", renamed: Mapping[str, str] | None = None
) -> Iterator[Option]:
    """Every option of a dataclass and of those that its fields hold, in their order.

    A field's metadata may hold `flag`; one that holds a dataclass, `renamed`: field -> flag for the fields below it,
    "" for one that has no flag.
    """
    texts, hints, renamed = describe(kind), get_type_hints(kind), renamed or {}
    group = group or summary(kind)
    for field in dataclasses.fields(kind):
        inner = _without_none(hints[field.name])
        flag = renamed.get(field.name, flag_of(field))
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type), "a hint names a class"
            yield from options(inner, (*path, field.name), group, field.metadata.get("renamed"))
        elif flag:
            yield Option(group, (*path, field.name), flag, hints[field.name], texts[field.name])


def summary(kind: type) -> str:
    """The first sentence of a class's docstring."""
    return (inspect.getdoc(kind) or kind.__name__).split("\n", 1)[0].removesuffix(".")


def describe(kind: type) -> dict[str, str]:
    """Field -> what the section `Attributes:` of a dataclass's docstring says of it; "" where it says nothing."""
    texts = dict.fromkeys((field.name for field in dataclasses.fields(kind)), "")
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].split("\n\n")[0]
    for entry in re.split(r"\n(?= {4}\w)", "\n" + section.rstrip()):
        name, found, text = entry.strip().partition(": ")
        if found and name in texts:
            texts[name] = re.sub(r"\s+", " ", text)
    return texts


def add_flag(parser: argparse._ArgumentGroup, option: Option, default: Any, *, required: bool = False) -> None:
    """A flag for an option; parsed, it stands under its `Option.flag`, and only where it was given."""
    inner = _without_none(option.kind)
    shown = ",".join(map(str, default)) if isinstance(default, tuple | list) else default
    shown = "none" if shown in (None, "") else shown
    text = option.text if required else f"{option.text.removesuffix('.')} (default: {shown})"
    common: dict[str, Any] = {
        "dest": option.flag,
        "default": argparse.SUPPRESS,
        "help": text.replace("%", "%%"),
        "required": required,
    }
    if inner is bool:
        parser.add_argument(f"--{option.flag}", action=argparse.BooleanOptionalAction, **common)
    elif get_origin(inner) is Literal:
        parser.add_argument(f"--{option.flag}", choices=get_args(inner), **common)
    else:
        metavar = "A,B,..." if get_origin(inner) is tuple else _METAVARS[inner]
        parser.add_argument(f"--{option.flag}", type=_converter(option.kind), metavar=metavar, **common)


def _converter(kind: Any) -> Callable[[str], Any]:
    """What makes an option's value of a flag's text."""
    inner = _without_none(kind)

    def convert(text: str) -> Any:
        if text == "none" and inner is not kind:
            return None
        if get_origin(inner) is tuple:
            return tuple(get_args(inner)[0](part) for part in text.split(",") if part)
        return inner(text)

    named = get_args(inner)[0] if get_origin(inner) is tuple else inner
    convert.__name__ = named.__name__  # argparse names it where the text is wrong
    return convert


def build(kind: type[T], content: Mapping[str, Any], where: str = "") -> T:
    """A dataclass of what JSON holds of it; fields that it lacks keep their defaults.

    Raises:
        ConfigError: a name that is no field, a value of another type, or what the dataclass itself refuses.
    """
    hints = get_type_hints(kind)
    if unknown := set(content) - set(hints):
        name = ", ".join(f"{where}{name}" for name in sorted(unknown))
        raise ConfigError(f"configuration: got {name}, which is no option; want some of {', '.join(hints)}")
    return kind(**{name: _value(hints[name], value, f"{where}{name}") for name, value in content.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    inner = _without_none(kind)
    if value is None and inner is not kind:
        return None
    if dataclasses.is_dataclass(inner) and isinstance(inner, type) and isinstance(value, Mapping):
        return build(inner, value, f"{where}.")
    if get_origin(inner) is tuple and isinstance(value, list | tuple):
        return tuple(_value(get_args(inner)[0], part, where) for part in value)
    if get_origin(inner) is Literal:
        if value not in get_args(inner):
            raise ConfigError(f"{where}: got {value!r}, want one of {', '.join(map(str, get_args(inner)))}")
        return value
    wanted = (int, float) if inner is float else inner
    if not isinstance(inner, type) or not isinstance(value, wanted) or (inner is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: got {value!r}, want a value of type {getattr(inner, '__name__', inner)}")
    return inner(value)


def check_positive(options: Any, *names: str) -> None:
    """Raises ConfigError for an option that is not more than 0."""
    for name in names:
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')}: got {getattr(options, name)}, want more than 0")


def _without_none(kind: Any) -> Any:
    """The type X of `X | None`; other types as they are."""
    if get_origin(kind) in (Union, types.UnionType):
        rest = [each for each in get_args(kind) if each is not types.NoneType]
        return rest[0] if len(rest) == 1 else Union[tuple(rest)]  # noqa: UP007 - made of a list
    return kind
