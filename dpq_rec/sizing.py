"""Choose a code layout for a compression ratio. In: V, E, a ratio. Out: D, K, L and the dtype of values.

Of the layouts that tell about as much of a row as the best one, by the one line of `_told_bits`, the quickest to decode
is taken: other measurements make another line.
"""

from __future__ import annotations

import itertools
from typing import Any

from dpq_rec.codes import CodeLayout
from dpq_rec.errors import ConfigError

_NUM_CODES = (256, 128, 64, 32, 16, 8, 4, 2)
_MOST_LEVELS = 24  # that were measured
_ENOUGH = 0.98  # of the most that a layout tells: one that tells so much is as good
_VALUE_BYTES = 2  # of fp16


def choose_layout(
    num_embeddings: int, embedding_dim: int, ratio: float, *, share_subspaces: bool = False
) -> dict[str, Any]:
    """What a `DPQConfig` has to change so that a table becomes `ratio` times smaller, or a little more.

    Bytes are those of packed codes and values as an artifact holds them (`compression_ratio`), values in fp16. Of all
    K and D, each with as many levels as fit, those that tell most of a row are taken (`_told_bits`); among these those
    with the fewest codes a row, which decode fastest, and of them the one with the fewest bytes of values.

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
    shape = num_embeddings, embedding_dim

    def ratio_of(layout: CodeLayout) -> float:
        num_bytes = layout.table_bytes(shape, _VALUE_BYTES, share_subspaces=share_subspaces)
        return 4 * num_embeddings * embedding_dim / num_bytes

    def largest_fit(num_codes: int, num_subspaces: int) -> CodeLayout | None:
        """The layout with the most levels that reaches the ratio."""
        sizes = {"num_subspaces": num_subspaces, "num_codes": num_codes}
        layouts = (CodeLayout(**sizes, num_levels=num_levels) for num_levels in range(_MOST_LEVELS, 0, -1))
        return next((layout for layout in layouts if ratio_of(layout) >= ratio), None)

    divisors = [d for d in range(1, embedding_dim + 1) if embedding_dim % d == 0]
    divisors = divisors[:-1] or divisors  # subspaces of one number have no directions, which keys of a cosine need
    fits = [found for k, d in itertools.product(_NUM_CODES, divisors) if (found := largest_fit(k, d))]
    if not fits:
        largest = max(ratio_of(CodeLayout(num_subspaces=d, num_codes=2)) for d in divisors)
        got = f"{ratio:g} for a table of {num_embeddings} rows of {embedding_dim} numbers"
        raise ConfigError(
            f"target_ratio: got {got}, want at most {int(largest * 100) / 100:g}: it is too small for more"
        )
    enough = _ENOUGH * max(map(_told_bits, fits))
    layout = min(
        (fit for fit in fits if _told_bits(fit) >= enough),
        key=lambda fit: (fit.codes_per_row, -ratio_of(fit)),
    )
    return {
        "num_subspaces": layout.num_subspaces,
        "num_codes": layout.num_codes,
        "num_levels": layout.num_levels,
        "values_dtype": "float16",
    }


def _told_bits(layout: CodeLayout) -> float:
    """What the codes of a row tell about it, of their bits: residual k-means is the better the larger K is.

    Say that B bits which leave a share q of the squared lengths of vectors over tell E / 2 * log2(1 / q) of them, as a
    Gaussian's rate is. At a ratio of 20, on the item table that two-tower learns on Gowalla, 66 to 68 % of the bits of
    K=4 tell something, 70 to 74 % of K=16, 76 to 82 % of K=64 and 82 to 88 % of K=256, whatever D and L are: so K=64,
    D=16 leaves 0.181 over, K=16 in one subspace of 22 levels 0.231. On MovieLens-1M's, whose spectrum falls, K=8, D=32
    leaves least over of all that fit (0.150), which is what the line below chooses there.
    """
    return layout.codes_per_row * layout.code_bits * (0.62 + 0.027 * layout.code_bits)
