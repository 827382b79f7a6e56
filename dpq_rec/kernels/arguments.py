"""Arguments of the C++. In: arrays. Out: what it makes of them, or a ConfigError that says what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dpq_rec.errors import ConfigError

T = TypeVar("T")


class HasNative:
    """Base of what has a cached property `native`, its C++ object: copies and other processes make their own."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "native"}


def call(function: Callable[..., T], *arguments: Any) -> T:
    """What a function of the C++ returns. It looks at its arguments itself, which costs nothing where they are right.

    Raises:
        ConfigError: they are of another type or size, not contiguous, or read-only where it writes.
    """
    try:
        return function(*arguments)
    except (TypeError, ValueError) as error:
        raise argument_error(error, function, *arguments) from error


def argument_error(error: TypeError | ValueError, function: Callable[..., Any], *arguments: Any) -> ConfigError:
    """What `call` raises where a function of the C++ has raised an error."""
    got = ", ".join(map(shown, arguments))
    if isinstance(error, ValueError):
        return ConfigError(f"{function.__name__}: {error}; got {got}")
    signatures = str(function.__doc__ or function.__init__.__doc__).splitlines()
    wanted = "; or ".join(signature.partition(" -> ")[0] for signature in signatures if "(" in signature)
    return ConfigError(f"got {got}; want {wanted}")


def shown(argument: Any) -> str:
    """Type and sizes of an argument, as a message says them."""
    if isinstance(argument, np.ndarray):
        flags = argument.flags
        notes = ["not contiguous"] * (not flags.c_contiguous) + ["read-only"] * (not flags.writeable)
        return " ".join([str(argument.dtype), str(list(argument.shape)), *notes])
    if isinstance(argument, list | tuple):
        return f"[{', '.join(map(shown, argument[:3]))}{', ...' if len(argument) > 3 else ''}]"
    return repr(argument) if isinstance(argument, int | None) else type(argument).__name__


def new_array(like: Any, *sizes: int, dtype: DTypeLike) -> NDArray[Any]:
    """An array [N, *sizes] to be filled, N being the length of another.

    Raises:
        ConfigError: the other has no length, or there is no such dtype.
    """
    try:
        return np.empty((len(like), *sizes), dtype)
    except TypeError as error:
        raise ConfigError(f"got {shown(like)} and dtype {dtype!r}, want an array [N] and float32 or float16") from error


def check_array(what: str, array: Any, dtype: DTypeLike, *sizes: int | None) -> None:
    """Refuse what is no array of that dtype and those sizes, of which None is any.

    Raises:
        ConfigError: it is not.
    """
    is_array = isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == len(sizes)
    if not is_array or any(want not in (None, got) for got, want in zip(array.shape, sizes, strict=True)):
        shape = ", ".join("*" if size is None else str(size) for size in sizes)
        raise ConfigError(f"{what}: got {shown(array)}, want {np.dtype(dtype)} [{shape}]")
