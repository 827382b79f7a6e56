"""How large codes and values of a table may be. In: V, E, a ratio. Out: D, K, L and the dtype of values.

The rule is a list of shapes in the order of preference, `PREFERRED`, and one number, `ENOUGH`: other measurements make
another list.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from dpq_rec.codes import CodeLayout
from dpq_rec.errors import ConfigError

PREFERRED = ((256, 16), (256, 32), (256, 64), (16, 64), (16, 32), (16, 16), (16, 8), (8, 8), (32, 4))
"""K, and numbers in a subspace: of shapes with as many code bits the earlier is taken.

By two-tower runs on Gowalla (tens of thousands of rows, E=64, 11 to 12 bytes a row, which is a ratio of 20): residual
levels in wide subspaces beat one level in narrow ones, and the wider the better: fitted to the same tables, K=16 in one
subspace keeps 82 % of recall@20, in four 78 %. The rest is inferred from there. Values count too: a few thousand rows
leave no room for those of wide subspaces, and D=8 with K=8 has more code bits; from some hundred thousand rows on those
of K=256 hardly count, and few wide levels are quick to decode.
"""

ENOUGH = 0.9  # of the most code bits that fit: a shape with so many is as good, and the earlier one is taken
_MOST_LEVELS = 24  # that were measured
_ANY_NUM_CODES = (256, 128, 64, 32, 16, 8, 4, 2)
_VALUE_BYTES = 2  # of fp16


class _Table(NamedTuple):
    num_embeddings: int
    embedding_dim: int
    share_subspaces: bool

    def ratio(self, layout: CodeLayout) -> float:
        """Bytes of the fp32 table to those of codes and values."""
        shape = (self.num_embeddings, self.embedding_dim)
        num_bytes = layout.table_bytes(shape, _VALUE_BYTES, share_subspaces=self.share_subspaces)
        return 4 * self.num_embeddings * self.embedding_dim / num_bytes


def choose_layout(
    num_embeddings: int, embedding_dim: int, ratio: float, *, share_subspaces: bool = False
) -> dict[str, Any]:
    """What a `DPQConfig` has to change so that a table becomes `ratio` times smaller, or a little more.

    Bytes are those of packed codes and values as an artifact holds them (`compression_ratio`), values in fp16. Of the
    shapes in `PREFERRED`, each with as many levels as fit, the first that has ENOUGH code bits is taken; where none
    fits, any shape that has.

    Args:
        num_embeddings: V.
        embedding_dim: E.
        ratio: of the bytes of the fp32 table to those of codes and values, at least.
        share_subspaces: as in `DPQConfig`.

    Returns:
        num_subspaces, num_codes, num_levels and values_dtype.

    Raises:
        ConfigError: the ratio cannot be reached: says the largest that can.
    """
    table = _Table(num_embeddings, embedding_dim, share_subspaces)
    divisors = [d for d in range(1, embedding_dim + 1) if embedding_dim % d == 0]
    preferred = [(k, min(divisors, key=lambda d: abs(d - embedding_dim / width))) for k, width in PREFERRED]
    wide = divisors[:-1] or divisors  # subspaces of one number have no directions, which keys of a cosine need
    any_shape = itertools.product(_ANY_NUM_CODES, wide)
    fits = _largest(table, preferred, ratio) or _largest(table, any_shape, ratio)
    if not fits:
        largest = max(table.ratio(CodeLayout(num_subspaces=d, num_codes=2)) for d in wide)
        got = f"{ratio:g} for a table of {num_embeddings} rows of {embedding_dim} numbers"
        raise ConfigError(
            f"target_ratio: got {got}, want at most {int(largest * 100) / 100:g}: it is too small for more"
        )
    enough = ENOUGH * max(map(_code_bits, fits))
    layout = next(layout for layout in fits if _code_bits(layout) >= enough)
    return {
        "num_subspaces": layout.num_subspaces,
        "num_codes": layout.num_codes,
        "num_levels": layout.num_levels,
        "values_dtype": "float16",
    }


def _largest(table: _Table, shapes: Iterable[tuple[int, int]], ratio: float) -> list[CodeLayout]:
    """Of each shape (K, D) the layout with the most levels that reaches the ratio, where one does."""
    found = []
    for num_codes, num_subspaces in shapes:
        for num_levels in range(_MOST_LEVELS, 0, -1):
            layout = CodeLayout(num_subspaces=num_subspaces, num_codes=num_codes, num_levels=num_levels)
            if table.ratio(layout) >= ratio:
                found.append(layout)
                break
    return found


def _code_bits(layout: CodeLayout) -> int:
    """Of a row."""
    return layout.codes_per_row * layout.code_bits
