"""Vectors of one level as JSON, copied from the texts of their values. In: a Coded, rows. Out: bytes.

A row's vector is the concatenation of D groups of numbers, of which there are only M x K: their texts are written once.
To write every number anew with orjson makes a request of 256 ids of 64 numbers take 2.3 times as long from end to end,
one of 2,000 ids 4.8 times.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dpq_rec.errors import ConfigError
from dpq_rec.kernels import Coded, _native, check_coded, check_damage
from dpq_rec.kernels.arguments import HasNative, call


@dataclasses.dataclass(frozen=True, eq=False)
class JsonTexts(HasNative):
    """What the JSON of the vectors of a Coded is made of.

    Attributes:
        groups: the text of each group of values, "1.5,-0.25,", one behind the other.
        ends_G: where each ends (uint32); group m*K + k is that of values_MKS[m, k]. Behind the last stand as many
            empty ones as its bits can name codes that there are not.
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

        Raises:
            ConfigError: vectors of several levels, which are sums and have no texts of their groups; or another dtype.
        """
        check_coded(stored)
        layout = stored.layout
        if layout.num_levels > 1 or np.dtype(dtype) not in (np.float32, np.float16):
            raise ConfigError(f"texts: got {layout.num_levels} levels and {dtype!r}, want 1, and float32 or float16")
        with np.errstate(over="ignore"):  # decode rounds to infinity, too
            values_MKS = stored.values_MKS.astype(dtype)
        groups = write(values_MKS.ravel()) + b","
        ends = (np.frombuffer(groups, np.uint8) == ord(",")).nonzero()[0][
            values_MKS.shape[2] - 1 :: values_MKS.shape[2]
        ]
        ends_G = np.pad(ends + 1, (0, (1 << layout.code_bits) - layout.num_codes), mode="edge").astype(np.uint32)
        return cls(groups, ends_G, b"[%b]," % write(np.zeros(stored.embedding_dim, dtype)))

    @functools.cached_property
    def native(self) -> _native.JsonTexts:
        """The same, as the C++ takes it."""
        return call(_native.JsonTexts, self.groups, self.ends_G, self.zeros)


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
    check_coded(stored)
    text, bad_at = call(_native.decode_to_json, stored.native, texts.native, rows_N, before, after)
    check_damage(stored, rows_N, bad_at)
    return text
