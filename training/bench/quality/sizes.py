"""Which size of a method fits into so many bytes. In: tables, a budget. Out: a size for each table, or None: plain.

A budget is for all tables together. Each table gets the same share of its fp32 bytes; one that a method cannot make so
small (two rows are no use to a clustering) stays plain, and the others make up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import numpy as np

from dpq_rec import ConfigError

Shape = tuple[int, int]
"""V and E of a table."""

_SHARES = np.geomspace(1, 1e-4, 2000)
FLOAT_BYTES = 2  # all that is not a code is stored in fp16: at equal bytes, twice as many numbers


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
    budget = int(sum(map(plain_bytes, shapes.values())) / ratio)
    best: dict[str, S | None] = {}
    most = -1
    for share in _SHARES:
        sizes = {name: _smaller(shape, share, largest) for name, shape in shapes.items()}
        taken = sum(bytes_of(shapes[name], size) for name, size in sizes.items())
        if most < taken <= budget:
            best, most = sizes, taken
    if not best:
        raise ConfigError(f"budget: got {budget} bytes, a ratio of {ratio}, and the method fits into none so small")
    return best


def bytes_of(shape: Shape, size: Sized | None) -> int:
    """Bytes of a table at a size, or plain."""
    return plain_bytes(shape) if size is None else size.num_bytes(*shape)


def _smaller(shape: Shape, share: float, largest: Largest[S]) -> S | None:
    most = int(share * plain_bytes(shape))
    size = largest(*shape, most)
    assert size is None or size.num_bytes(*shape) <= most, "largest() keeps to its bytes"
    return size
