"""Dataclasses of options to flags and back. In: option groups. Out: argparse flags, and groups built of JSON.

An option stands in one place: as a field of its group, described in the group's docstring. Its flag, type, choices and
help come from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import shlex
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
        kind: its type: bool, int, float, str, a Literal, a tuple of these or of tuples, or one of them or None; or
            options of each of several tables: table -> option -> value.
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
    shown = shown_as_flag(default)
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
        parser.add_argument(f"--{option.flag}", type=_converter(option.kind), metavar=_metavar(inner), **common)


def _metavar(kind: Any) -> str:
    if get_origin(kind) is dict:
        return "TABLE.OPTION=VALUE ..."
    if get_origin(kind) is tuple:
        return "A:B,..." if get_origin(get_args(kind)[0]) is tuple else "A,B,..."
    return _METAVARS[kind]


def shown_as_flag(value: Any) -> str:
    """A value as its flag takes it."""
    if isinstance(value, Mapping):
        changes = [(f"{table}.{name}", each) for table, options in value.items() for name, each in options.items()]
        return " ".join(shlex.quote(place) + "=" + _shown_in_table(each) for place, each in changes) or "none"
    if isinstance(value, tuple | list):
        value = ",".join(":".join(map(str, part)) if isinstance(part, tuple | list) else str(part) for part in value)
    return "none" if value in (None, "") else str(value)


def _shown_in_table(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value in ((), []) else shown_as_flag(value)


def _converter(kind: Any) -> Callable[[str], Any]:
    """What makes an option's value of a flag's text."""
    inner = _without_none(kind)

    def convert(text: str) -> Any:
        return from_text(kind, text)

    named = get_args(inner)[0] if get_origin(inner) is tuple else inner
    named = get_args(named)[0] if get_origin(named) is tuple else named
    convert.__name__ = getattr(named, "__name__", "value")  # argparse names it where the text is wrong
    return convert


def from_text(kind: Any, text: str) -> Any:
    """An option's value of a flag's text: parts of a tuple stand between commas, and parts of those between colons.

    Raises:
        ValueError: the text is none of the kind.
    """
    inner = _without_none(kind)
    if text == "none" and inner is not kind:
        return None
    if get_origin(inner) is dict:
        return _changes_from_text(text)
    if get_origin(inner) is Literal:
        return text
    if inner is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if get_origin(inner) is not tuple:
        return inner(text)
    each = get_args(inner)[0]
    parts = [part for part in text.split(",") if part]
    if get_origin(each) is not tuple:
        return tuple(each(part) for part in parts)
    return tuple(
        tuple(kind(piece) for kind, piece in zip(get_args(each), part.split(":"), strict=True)) for part in parts
    )


def _changes_from_text(text: str) -> dict[str, dict[str, str]]:
    """Table -> option -> text, of `TABLE.OPTION=VALUE TABLE.OPTION=VALUE ...`; quotes hold a name with blanks together.

    Raises:
        ValueError: something else.
    """
    changes: dict[str, dict[str, str]] = {}
    for entry in shlex.split(text):
        place, found, value = entry.partition("=")
        table, _, option = place.rpartition(".")
        if not (found and table and option):
            raise argparse.ArgumentTypeError(f"got {entry!r}, want TABLE.OPTION=VALUE")
        changes.setdefault(table, {})[option.replace("-", "_")] = value
    return changes


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


def changes(kind: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values of some fields of a dataclass, of JSON, or of text as their flags take it.

    Raises:
        ConfigError: a name that is no field, or a value of another type.
    """
    hints, read = get_type_hints(kind), {}
    for name, value in given.items():
        if name not in hints:
            raise ConfigError(f"{where}{name}: there is no such option; want some of {', '.join(hints)}")
        try:
            typed = from_text(hints[name], value) if isinstance(value, str) else value
        except ValueError as error:
            raise ConfigError(f"{where}{name}: got {value!r}, want what its flag takes") from error
        read[name] = _value(hints[name], typed, f"{where}{name}")
    return read


def _value(kind: Any, value: Any, where: str) -> Any:
    inner = _without_none(kind)
    if value is None and inner is not kind:
        return None
    if dataclasses.is_dataclass(inner) and isinstance(inner, type) and isinstance(value, Mapping):
        return build(inner, value, f"{where}.")
    if get_origin(inner) is tuple and isinstance(value, list | tuple):
        kinds = get_args(inner)
        kinds = (kinds[0],) * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: got {value!r}, want {len(kinds)} values")
        return tuple(_value(kind, part, where) for kind, part in zip(kinds, value, strict=True))
    if get_origin(inner) is dict and isinstance(value, Mapping):
        return {name: _value(get_args(inner)[1], each, f"{where}.{name}") for name, each in value.items()}
    if inner is Any:
        return value
    if get_origin(inner) is Literal:
        if value not in get_args(inner):
            raise ConfigError(f"{where}: got {value!r}, want one of {', '.join(map(str, get_args(inner)))}")
        return value
    wanted = (int, float) if inner is float else inner
    if not isinstance(inner, type) or not isinstance(value, wanted) or (inner is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: got {value!r}, want a value of type {getattr(inner, '__name__', inner)}")
    return inner(value)


def check_positive(options: Any, *names: str) -> None:
    """Raises ConfigError for an option that is not more than 0, or is infinite; none is none."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            wanted = "a finite number" if value == float("inf") else "more than 0"
            raise ConfigError(f"--{name.replace('_', '-')}: got {value}, want {wanted}")


def _without_none(kind: Any) -> Any:
    """The type X of `X | None`; other types as they are."""
    if get_origin(kind) in (Union, types.UnionType):
        rest = [each for each in get_args(kind) if each is not types.NoneType]
        return rest[0] if len(rest) == 1 else Union[tuple(rest)]  # noqa: UP007 - made of a list
    return kind
