"""Groups of options as flags and as JSON. In: dataclasses. Out: their flags, and dataclasses built of text and of JSON.

An option stands in one place: as a field of its group, described in the group's docstring. Its flag, type, choices and
help come from there (`training.command_line`).
"""

from __future__ import annotations

import dataclasses
import shlex
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from dpq_rec import ConfigError

T = TypeVar("T")
SYNTHETIC = "synthetic"  # data that are generated


class Options:
    """A group of options: a frozen dataclass that checks itself.

    Attributes:
        lacks: why the recipe of these options has not a flag, or the flags of another recipe: either's name -> reason.
    """

    lacks: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def useless_flags(cls, values: Mapping[str, Any]) -> dict[str, str]:
        """Flags that have no use beside the values of others -> the reason; a user who gives one is told.

        Args:
            values: of all options of the recipe, by flag.
        """
        return {}

    def check_run(self, run: Any) -> None:
        """Raises ConfigError where these options of a model and the others of a RunConfig make no sense together."""


class Option(NamedTuple):
    """One option of a run.

    Attributes:
        flag: its name on the command line, without dashes in front.
        path: where it stands in the configuration: ("embedding", "dpq", "num_codes").
        group: the dataclass whose field it is.
        kind: its type: bool, int, float, str, a Literal, a tuple of these or of tuples, or one of them or None; or
            options of each of several tables: table -> option -> value.
    """

    flag: str
    path: tuple[str, ...]
    group: type
    kind: Any


def options_of(kind: type, path: tuple[str, ...] = (), renamed: Mapping[str, str] | None = None) -> Iterator[Option]:
    """Every option of a dataclass and of those that its fields hold, in their order.

    A flag has the name of its field, unless the field's metadata hold another under `flag`. A field that holds a
    dataclass may have `renamed`: field -> flag for the fields below it, "" for one that has no flag.
    """
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = without_none(hints[field.name])
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from options_of(inner, (*path, field.name), field.metadata.get("renamed"))
            continue
        flag = (renamed or {}).get(field.name, field.metadata.get("flag", field.name)).replace("_", "-")
        if flag:
            yield Option(flag, (*path, field.name), kind, hints[field.name])


def without_none(kind: Any) -> Any:
    """The type X of `X | None`; other types as they are."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = [each for each in get_args(kind) if each is not types.NoneType]
    return kind


def to_text(value: Any) -> str:
    """A value as its flag takes it."""
    if isinstance(value, Mapping):
        changes = [(f"{table}.{name}", each) for table, options in value.items() for name, each in options.items()]
        return " ".join(shlex.quote(place) + "=" + _to_text_in_table(each) for place, each in changes) or "none"
    if isinstance(value, tuple | list):
        value = ",".join(":".join(map(str, part)) if isinstance(part, tuple | list) else str(part) for part in value)
    return "none" if value in (None, "") else str(value)


def _to_text_in_table(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value in ((), []) else to_text(value)


def from_text(kind: Any, text: str) -> Any:
    """A value from a flag's text: parts of a tuple stand between commas, and parts of those between colons.

    Raises:
        ValueError: the text is not of the type.
    """
    inner = without_none(kind)
    if text == "none" and inner is not kind:
        return None
    if get_origin(inner) is dict:
        return _tables_from_text(text)
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


def _tables_from_text(text: str) -> dict[str, dict[str, str]]:
    """Table -> option -> text, of `TABLE.OPTION=VALUE TABLE.OPTION=VALUE ...`; quotes hold a name with blanks together.

    Raises:
        ValueError: something else.
    """
    tables: dict[str, dict[str, str]] = {}
    for entry in shlex.split(text):
        place, found, value = entry.partition("=")
        table, _, option = place.rpartition(".")
        if not (found and table and option):
            raise ValueError(f"got {entry!r}, want TABLE.OPTION=VALUE")
        tables.setdefault(table, {})[option.replace("-", "_")] = value
    return tables


def build(kind: type[T], content: Mapping[str, Any], where: str = "") -> T:
    """A dataclass of what JSON holds of it; fields that it lacks keep their defaults.

    Raises:
        ConfigError: a name that is no field, a value of another type, or what the dataclass itself refuses.
    """
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := set(content) - set(names):
        name = ", ".join(f"{where}{name}" for name in sorted(unknown))
        raise ConfigError(f"configuration: got {name}, which is no option; want some of {', '.join(names)}")
    return kind(**{name: typed(hints[name], value, f"{where}{name}") for name, value in content.items()})


def typed(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as the type that an option has: lists as tuples, groups of options as their dataclasses.

    Raises:
        ConfigError: it is of another type; `where` names it.
    """
    inner = without_none(kind)
    if (value is None and inner is not kind) or inner is Any:
        return value
    if dataclasses.is_dataclass(inner) and isinstance(inner, type) and isinstance(value, Mapping):
        return build(inner, value, f"{where}.")
    if get_origin(inner) is tuple and isinstance(value, list | tuple):
        kinds = get_args(inner)
        kinds = (kinds[0],) * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: got {value!r}, want {len(kinds)} values")
        return tuple(typed(kind, part, where) for kind, part in zip(kinds, value, strict=True))
    if get_origin(inner) is dict and isinstance(value, Mapping):
        return {name: typed(get_args(inner)[1], each, f"{where}.{name}") for name, each in value.items()}
    if get_origin(inner) is Literal:
        if value not in get_args(inner):
            raise ConfigError(f"{where}: got {value!r}, want one of {', '.join(map(str, get_args(inner)))}")
        return value
    wanted = (int, float) if inner is float else inner
    if not isinstance(inner, type) or not isinstance(value, wanted) or (inner is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: got {value!r}, want a value of type {getattr(inner, '__name__', inner)}")
    return inner(value)


def check_positive(options: Any, *names: str) -> None:
    """Raises ConfigError for an option that is not more than 0, or is infinite; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            wanted = "a finite number" if value == float("inf") else "more than 0"
            raise ConfigError(f"--{name.replace('_', '-')}: got {value}, want {wanted}")


def check_share(options: Any, *names: str) -> None:
    """Raises ConfigError for a share to be left out that leaves nothing."""
    for name in names:
        if not 0 <= getattr(options, name) < 1:
            got = f"--{name.replace('_', '-')}: got {getattr(options, name)}"
            raise ConfigError(f"{got}, want 0 or more and less than 1")


def check_path(path: str, *, can_be_generated: bool = False) -> None:
    """Raises ConfigError for data that are not there."""
    if not path:
        raise ConfigError("--data is missing")
    if not (can_be_generated and path == SYNTHETIC) and not Path(path).exists():
        reason = ": only interactions can be generated" if path == SYNTHETIC else ""
        raise ConfigError(f"--data: {path} does not exist{reason}")
