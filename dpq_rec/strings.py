"""Many strings in two arrays. In: str. Out: their UTF-8 in one array of bytes, and where each begins; and str again.

The arrays may be mapped from a file: whatever the offsets say, nothing outside the bytes is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import DamagedArtifactError

_CHECK_STRINGS = 1 << 16  # whose UTF-8 is looked at together


class PackedStrings(NamedTuple):
    """U strings: their UTF-8, T bytes (uint8 [T]), and where each begins, the end behind them (int64 [U + 1]).

    >>> packed = PackedStrings.pack([b"red", b"", b"blue"])
    >>> packed.offsets_U1.tolist()
    [0, 3, 3, 7]
    >>> packed.unpack(np.array([2, 0]))
    ['blue', 'red']
    """

    bytes_T: NDArray[np.uint8]
    offsets_U1: NDArray[np.int64]

    @classmethod
    def pack(cls, texts_U: Sequence[bytes]) -> PackedStrings:
        """Strings, encoded in UTF-8, in the order in which they come."""
        offsets_U1 = np.zeros(len(texts_U) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, texts_U), np.int64, len(texts_U)), out=offsets_U1[1:])
        return cls(np.frombuffer(b"".join(texts_U), np.uint8), offsets_U1)

    def unpack(self, positions_N: NDArray[np.int64]) -> list[str]:
        """The strings at positions, each at most once.

        Raises:
            DamagedArtifactError: one lies outside the bytes, overlaps with another, or is not UTF-8.
        """
        begins_N, ends_N = self.offsets_U1[positions_N], self.offsets_U1[positions_N + 1]
        num_bytes = len(self.bytes_T)
        outside = (begins_N < 0).any() or (ends_N < begins_N).any() or (ends_N > num_bytes).any()
        if outside or (ends_N - begins_N).sum() > num_bytes:  # else a small file could ask for any amount of memory
            raise DamagedArtifactError(f"the vocabulary's ids do not lie one behind the other in its {num_bytes} bytes")
        content = self.bytes_T.data
        try:
            return [str(content[b:e], "utf-8") for b, e in zip(begins_N.tolist(), ends_N.tolist(), strict=True)]
        except UnicodeDecodeError as error:
            raise DamagedArtifactError(f"the vocabulary holds an id that is not UTF-8: {error}") from error

    def check_arrays(self) -> None:
        """See that the two arrays belong together, without a look at what is between their ends.

        Raises:
            DamagedArtifactError: they do not.
        """
        bytes_T, offsets_U1 = self
        wrong = None
        if bytes_T.dtype != np.uint8 or bytes_T.ndim != 1:
            wrong = f"the ids' bytes: got {bytes_T.dtype} {bytes_T.shape}, want uint8 [T]"
        elif offsets_U1.dtype != np.int64 or offsets_U1.ndim != 1 or not len(offsets_U1):
            wrong = f"the ids' offsets: got {offsets_U1.dtype} {offsets_U1.shape}, want int64 [U + 1]"
        elif offsets_U1[0] != 0 or offsets_U1[-1] != len(bytes_T):
            ends = f"{offsets_U1[0]} to {offsets_U1[-1]}"
            wrong = f"the ids' offsets: got {ends}, want 0 to {len(bytes_T)}, all the bytes"
        if wrong:
            raise DamagedArtifactError(wrong)

    def check_utf8(self) -> None:
        """Look at every string.

        Raises:
            DamagedArtifactError: as `unpack`.
        """
        num_strings = len(self.offsets_U1) - 1
        for start in range(0, num_strings, _CHECK_STRINGS):
            self.unpack(np.arange(start, min(start + _CHECK_STRINGS, num_strings)))


class LazyStrings:
    """Strings at positions of a long list, made when they are asked for: a slice, all, or some, each at most once."""

    def __init__(self, packed: PackedStrings, positions_N: NDArray[np.int64]) -> None:
        self.packed, self.positions_N = packed, positions_N

    def __len__(self) -> int:
        return len(self.positions_N)

    def __getitem__(self, part: slice | NDArray[np.int64]) -> list[str]:
        return self.packed.unpack(self.positions_N[part])

    def tolist(self) -> list[str]:
        """All of them."""
        return self[:]
