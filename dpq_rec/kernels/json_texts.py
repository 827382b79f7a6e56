"""Vectors of one level as JSON, copied from the texts of their values. In: a Coded, rows. Out: bytes.

A row's vector is the concatenation of D groups of numbers, of which there are only M x K: their texts are written once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dpq_rec.kernels import Coded, _native, check_damage


@dataclasses.dataclass(frozen=True, eq=False)
class JsonTexts:
    """What the JSON of the vectors of a Coded is made of.

    Attributes:
        groups: the text of each group of values, "1.5,-0.25,", one behind the other.
        ends_G: where each ends (uint32); group m*K + k is that of values_MKS[m, k].
        zeros: the text of a missing row, "[0.0,0.0],".
    """

    groups: bytes
    ends_G: NDArray[np.uint32]
    zeros: bytes

    @classmethod
    def of(cls, stored: Coded, dtype: DTypeLike, write: Callable[[NDArray[np.floating]], bytes]) -> JsonTexts:
        """Write the values.

        Args:
            stored: all of its tiers have one level.
            dtype: that vectors are rounded to, as in `decode`.
            write: numbers of that type, flat, as JSON with commas between them.
        """
        assert stored.num_levels == 1, "vectors of several levels are sums, and have no texts of their groups"
        with np.errstate(over="ignore"):  # decode rounds to infinity, too
            values_MKS = stored.values_MKS.astype(dtype)
        groups = write(values_MKS.ravel()) + b","
        ends = (np.frombuffer(groups, np.uint8) == ord(",")).nonzero()[0][
            values_MKS.shape[2] - 1 :: values_MKS.shape[2]
        ]
        return cls(groups, (ends + 1).astype(np.uint32), b"[%b]," % write(np.zeros(stored.embedding_dim, dtype)))

    @functools.cached_property
    def native(self) -> _native.JsonTexts:
        """The same, as the C++ takes it."""
        return _native.JsonTexts(self.groups, self.ends_G, self.zeros)


def decode_to_json(
    stored: Coded, texts: JsonTexts, rows_N: NDArray[np.int64], *, before: bytes = b"", after: bytes = b""
) -> bytes:
    """Vectors of rows as JSON, with commas between them: "[1.5,-0.25],[0.0,0.0]".

    Args:
        stored: the vectors of all rows.
        texts: its own.
        rows_N: as in `decode`.
        before: what the result begins with: to join it later would be to copy it all.
        after: what it ends with.

    Raises:
        DamagedArtifactError: as in `decode`.
    """
    text, bad_at = _native.decode_to_json(stored.native, texts.native, rows_N, before, after)
    check_damage(stored, rows_N, bad_at)
    return text
