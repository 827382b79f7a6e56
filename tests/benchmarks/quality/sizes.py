"""Which size of a method fits into so many bytes. In: tables, a budget. Out: a size for each table, or None: plain.

A budget is for all tables together. Each table gets the same share of its fp32 bytes, or the method's smallest size
where that is larger; one that the method cannot make smaller than it is (two rows are no use to a clustering) stays
plain. The share is as large as the budget allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from dpq_rec import ConfigError

Shape = tuple[int, int]
"""V and E of a table."""

FLOAT_BYTES = 2  # all that is not a code is stored in fp16: at equal bytes, twice as many numbers
_HALVINGS = 40


class Sized(Protocol):
    """A method with its size: a rank, a number of rows, a number of codes."""

    def num_bytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Bytes of a table [V, E] as they would lie on disk."""


S = TypeVar("S", bound=Sized)
Largest = Callable[[int, int, int], S | None]
"""V, E, bytes -> the largest size of a method that takes no more; None where there is none."""


def plain_bytes(shape: Shape) -> int:
    """Bytes of the fp32 table."""
    return 4 * shape[0] * shape[1]


def bytes_of(shape: Shape, size: Sized | None) -> int:
    """Bytes of a table at a size, or plain."""
    return plain_bytes(shape) if size is None else size.num_bytes(*shape)


def fit_to_budget(shapes: Mapping[str, Shape], ratio: float, largest: Largest[S]) -> dict[str, S | None]:
    """The sizes that fill the budget best and stay within it.

    Args:
        shapes: table -> V and E.
        ratio: of the fp32 tables' bytes to the budget.
        largest: of the method.

    Returns:
        Table -> its size; None for one that stays plain.

    Raises:
        ConfigError: no size is small enough.
    """
    budget = _budget(shapes, ratio)
    floors = {name: _least_bytes(shape, largest) for name, shape in shapes.items()}
    fitting = _sizes(shapes, floors, 0, largest)
    if _total(shapes, fitting) > budget:
        raise ConfigError(f"budget: got {budget} bytes, a ratio of {ratio}, and the method fits into none so small")
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        sizes = _sizes(shapes, floors, share, largest)
        if _total(shapes, sizes) <= budget:
            low, fitting = share, sizes
        else:
            high = share
    return fitting


def fits(shapes: Mapping[str, Shape], ratio: float, largest: Largest[S]) -> bool:
    """Whether `fit_to_budget` finds sizes."""
    floors = {name: _least_bytes(shape, largest) for name, shape in shapes.items()}
    return _total(shapes, _sizes(shapes, floors, 0, largest)) <= _budget(shapes, ratio)


def _budget(shapes: Mapping[str, Shape], ratio: float) -> int:
    return int(sum(map(plain_bytes, shapes.values())) / ratio)


def _total(shapes: Mapping[str, Shape], sizes: Mapping[str, Sized | None]) -> int:
    return sum(bytes_of(shapes[name], size) for name, size in sizes.items())


def _sizes(
    shapes: Mapping[str, Shape], floors: Mapping[str, int], share: float, largest: Largest[S]
) -> dict[str, S | None]:
    found = {}
    for name, shape in shapes.items():
        most = max(floors[name], int(share * plain_bytes(shape)))
        found[name] = None if floors[name] >= plain_bytes(shape) else largest(*shape, most)
    return found


def _least_bytes(shape: Shape, largest: Largest[S]) -> int:
    """Bytes from which on the method has a size; those of the plain table where it has none that is smaller."""
    low, high = 0, plain_bytes(shape)
    while low < high:
        middle = (low + high) // 2
        if largest(*shape, middle) is None:
            low = middle + 1
        else:
            high = middle
    return high
