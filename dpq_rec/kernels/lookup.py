"""The hot loops from ids to vectors. In: integers, in an array or as bytes; rows. Out: rows, vectors, a reply, JSON.

Those of lookups find and decode in one go: codes are on their way from memory while the next ids are searched. What
small lookups call goes to the C++ directly, which looks at its arguments itself: see `arguments.call`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

import dpq_rec.kernels._native as _native
from dpq_rec.errors import ConfigError, DamagedArtifactError
from dpq_rec.kernels import MISSING_ROW, Coded, Vectors, check_coded, check_damage, native_of
from dpq_rec.kernels.arguments import HasNative, argument_error, call, new_array

_NO_POSITIONS = np.empty(0, np.uint32)
_NUMBER_BYTES = {"float32": 4, "float16": 2, "codes": 0}


def find_integer_rows(ids_N: NDArray[np.int64], known: _native.Integers) -> NDArray[np.int64]:
    """Rows (int64) of integers, found in a sorted list of them; MISSING_ROW where an id is not in the list.

    Args:
        ids_N: what is looked for (int64), contiguous.
        known: of `ids.sorted_integers`.

    Raises:
        DamagedArtifactError: the tree leads an id to where it cannot be: it is not said to be missing.
    """
    try:
        out_N = np.empty(len(ids_N), np.int64)
        bad_at = _native.find_integer_rows(known, ids_N, out_N)
    except (TypeError, ValueError) as error:
        raise argument_error(error, _native.find_integer_rows, known, ids_N) from error
    _check_found(ids_N, bad_at)
    return out_N


def _check_found(ids_N: NDArray[np.int64], bad_at: int) -> None:
    """Raises DamagedArtifactError where an id, at a position that is not -1, was led astray by the tree."""
    if bad_at >= 0:
        raise DamagedArtifactError(f"the vocabulary's id_tree leads id {ids_N[bad_at]} to where it cannot be")


def _native_of(stored: Vectors) -> _native.Vectors:
    return stored.native if isinstance(stored, Coded) else native_of(stored)


def lookup_integers(
    ids_N: NDArray[np.int64],
    known: _native.Integers,
    stored: Vectors,
    *,
    dtype: DTypeLike = np.float32,
    num_threads: int = 1,
) -> tuple[NDArray[Any], NDArray[np.uint32]]:
    """`find_integer_rows` and `decode` in one.

    Args:
        ids_N: what is looked for (int64), contiguous.
        known: of `ids.sorted_integers`.
        stored: the vectors of all rows.
        dtype: as in `decode`.
        num_threads: likewise.

    Returns:
        vectors_NE, zeros where an id is not in the list; and the positions where that is so, ascending (uint32).

    Raises:
        DamagedArtifactError: as in both.
    """
    vectors = _native_of(stored)
    out_NE = new_array(ids_N, vectors.dim, dtype=dtype)
    rows_N = np.empty(len(out_NE), np.int64)
    num_missing, bad_id_at, *bad_at = call(_native.lookup_integers, known, vectors, ids_N, rows_N, out_NE, num_threads)
    _check_found(ids_N, bad_id_at)
    check_damage(stored, rows_N, bad_at)
    return out_NE, (rows_N == MISSING_ROW).nonzero()[0].astype(np.uint32) if num_missing else _NO_POSITIONS


def lookup_bytes(ids: bytes, known: _native.Integers, stored: Vectors, *, form: str) -> tuple[bytes, int]:
    """`lookup_integers` or, with the form "codes", `find_integer_rows` and `copy_codes`, from bytes to bytes.

    The numbers are as this machine has them.

    Args:
        ids: what is looked for (int64).
        known: of `ids.sorted_integers`.
        stored: the vectors of all rows; coded where codes are wanted.
        form: "float32", "float16" or "codes".

    Returns:
        A reply: rows, then the positions of those that are missing (uint32), then, of codes that have tiers, the tier
        of each. And how many are missing.

    Raises:
        DamagedArtifactError: as there.
    """
    if form not in _NUMBER_BYTES:
        raise ConfigError(f"form: got {form!r}, want {', '.join(_NUMBER_BYTES)}")
    arguments = known, _native_of(stored), ids, _NUMBER_BYTES[form]
    try:
        reply, num_missing, *bad_at = _native.lookup_bytes(*arguments)
    except (TypeError, ValueError) as error:
        raise argument_error(error, _native.lookup_bytes, *arguments) from error
    if max(bad_at) >= 0:
        ids_N, bad_id_at, at = np.frombuffer(ids, np.int64), bad_at[0], max(bad_at[1:])
        _check_found(ids_N, bad_id_at)
        row_1 = find_integer_rows(ids_N[at : at + 1], known)
        check_damage(stored, row_1, [min(position, 0) for position in bad_at[1:]])
        raise DamagedArtifactError(f"id {ids_N[at]}: its row was damaged, and is no more: the file changed meanwhile")
    return reply, num_missing


@dataclasses.dataclass(frozen=True, eq=False)
class JsonTexts(HasNative):
    """What the JSON of the vectors of a Coded of one level is made of.

    A row's vector is the concatenation of D groups of numbers, of which there are only M x K: their texts are written
    once. To write every number anew with orjson makes a request of 256 ids of 64 numbers take 2.3 times as long from
    end to end, one of 2,000 ids 4.8 times: the fastest times of two servers that took turns.

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
    arguments = _native_of(stored), texts.native, rows_N, before, after
    try:
        text, bad_at = _native.decode_to_json(*arguments)
    except (TypeError, ValueError) as error:
        raise argument_error(error, _native.decode_to_json, *arguments) from error
    if max(bad_at) >= 0:
        check_damage(stored, rows_N, bad_at)
    return text
