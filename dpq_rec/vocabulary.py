"""Ids to rows. In: the ids of a request. Out: rows_N (int64), MISSING_ROW where an id is not in the vocabulary.

Four kinds (contract 3): `identity` (ids are rows), `modulo` (row = id mod V), `int64` (a sorted list of ids and the row
of each) and `string` (the same of strings). Several ids of a list may share a row.

>>> vocabulary = Int64Vocabulary.from_pairs([70, 7, 9], [0, 1, 1])  # 7 and 9 are rare, and share a row
>>> vocabulary.rows([9, 70, 8, 7]).tolist()
[1, 0, -1, 1]
>>> ids_N, rows_N = vocabulary.ids_of_rows(0, 2)  # the way back, for export
>>> ids_N.tolist(), rows_N.tolist()
([70, 7, 9], [0, 1, 1])
>>> StringVocabulary.from_ids(["red", "blue"]).rows(["blue", "green"]).tolist()
[1, -1]
>>> ModuloVocabulary(10).rows([7, 123]).tolist()
[7, 3]

In the artifact:

    int64     ids int64 [U] ascending, rows uint32 [U]; id_tree int64, at most 1 byte an id
    string    id_bytes uint8 [T], the UTF-8 of all ids in ascending order of bytes; id_offsets int64 [U + 1]: id i is
              id_bytes[id_offsets[i] : id_offsets[i + 1]]; rows uint32 [U]; id_slots uint32, 6 bytes an id

`id_tree` and `id_slots` (`dpq_rec.kernels.ids`) find ids fast. Artifacts that lack them are read as well, slower.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ArtifactError, ConfigError, DamagedArtifactError, IdTypeError
from dpq_rec.files import PickledByPath
from dpq_rec.ids import int64_ids, string_ids
from dpq_rec.kernels import MISSING_ROW
from dpq_rec.kernels import ids as id_kernels
from dpq_rec.kernels.arguments import HasNative
from dpq_rec.kernels.lookup import find_integer_rows
from dpq_rec.strings import LazyStrings, PackedStrings

if TYPE_CHECKING:
    from dpq_rec.kernels import _native

RowIds = tuple[NDArray[Any] | LazyStrings, NDArray[np.int64]]
_SCAN_ROWS = 1 << 22  # ids looked through at a time by ids_of_rows and check
_MOST_ROWS = 1 << 32  # that uint32 can name


class Vocabulary(PickledByPath):
    """The map from ids to rows of one table."""

    kind: str

    def rows(self, ids: Any) -> NDArray[np.int64]:
        """Rows [N] of ids [N]; MISSING_ROW for an id that is not in the vocabulary.

        Raises:
            IdTypeError: ids of another type than the vocabulary's.
            DamagedArtifactError: its tensors are not what was published: nothing is read outside them.
        """
        raise NotImplementedError

    def ids_of_rows(self, start: int, stop: int) -> RowIds:
        """The ids [N] in rows start to stop-1 (strings are made on demand), and the row of each (int64), ascending."""
        raise NotImplementedError

    def indexed(self) -> Vocabulary:
        """The same, with its index (`id_tree` or `id_slots`), which finds ids faster."""
        return self

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """Its tensors in the artifact, beside the codes; none where ids are computed."""
        return {}

    def check(self, num_embeddings: int) -> None:
        """Look at every entry.

        Raises:
            DamagedArtifactError: ids out of order, a row outside the table, or another number of rows.
        """
        raise NotImplementedError


class IdentityVocabulary(Vocabulary):
    """Ids are rows."""

    kind = "identity"

    def __init__(self, num_embeddings: int) -> None:
        self.num_embeddings = num_embeddings

    def rows(self, ids: Any) -> NDArray[np.int64]:
        """See `Vocabulary.rows`."""
        ids_N = int64_ids(ids)
        return np.where((ids_N >= 0) & (ids_N < self.num_embeddings), ids_N, MISSING_ROW)

    def ids_of_rows(self, start: int, stop: int) -> RowIds:
        """See `Vocabulary.ids_of_rows`."""
        rows_N = np.arange(start, stop)
        return rows_N, rows_N

    def check(self, num_embeddings: int) -> None:
        """See `Vocabulary.check`."""
        if self.num_embeddings != num_embeddings:
            raise DamagedArtifactError(
                f"the {self.kind} vocabulary is one of {self.num_embeddings} rows, the table has {num_embeddings}"
            )


class ModuloVocabulary(IdentityVocabulary):
    """The hashing trick: row = id mod V. No id is missing; an export names a row by its lowest id, the row."""

    kind = "modulo"

    def __init__(self, num_embeddings: int) -> None:
        if num_embeddings < 1:
            raise ConfigError(f"modulo vocabulary: got {num_embeddings} rows, want 1 or more: no id would have a row")
        super().__init__(num_embeddings)

    def rows(self, ids: Any) -> NDArray[np.int64]:
        """See `Vocabulary.rows`."""
        return int64_ids(ids) % self.num_embeddings


class _ListVocabulary(Vocabulary):
    """Base of vocabularies that list their ids: a sorted list, the row of each id, and an index that may be missing."""

    rows_U: NDArray[np.uint32]

    @classmethod
    def from_ids(cls, ids_V: Sequence[Any] | NDArray[Any]) -> Self:
        """The vocabulary of a table whose row v holds ids_V[v].

        Raises:
            ConfigError, IdTypeError: as `from_pairs`.
        """
        return cls.from_pairs(ids_V, None)

    @classmethod
    def from_pairs(cls, ids_U: Sequence[Any] | NDArray[Any], rows_U: Sequence[int] | NDArray[Any] | None) -> Self:
        """The vocabulary of a table where ids_U[i], in any order, lives in row rows_U[i]. Ids may share a row.

        Args:
            ids_U: int64, or str.
            rows_U: the row of each; None for 0 to U-1.

        Raises:
            ConfigError: an id that is there twice, a row beyond uint32, or another number of rows than of ids.
            IdTypeError: ids that are no 64-bit integers, or no strings that UTF-8 can hold.
        """
        raise NotImplementedError

    def ids_of_rows(self, start: int, stop: int) -> RowIds:
        """See `Vocabulary.ids_of_rows`. Reads the list once, in pieces: the memory it takes does not grow with it."""
        entries, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for begin in range(0, len(self.rows_U), _SCAN_ROWS):
            # A copy: a file may change between two looks.
            piece_N = self.rows_U[begin : begin + _SCAN_ROWS].astype(np.int64)
            (here_P,) = ((piece_N >= start) & (piece_N < stop)).nonzero()
            entries.append(begin + here_P)
            rows.append(piece_N[here_P])
        entries_N, rows_N = np.concatenate(entries), np.concatenate(rows)
        order_N = np.argsort(rows_N, kind="stable")
        return self._ids_at(entries_N[order_N]), rows_N[order_N]

    def _ids_at(self, entries_N: NDArray[np.int64]) -> NDArray[Any] | LazyStrings:
        raise NotImplementedError

    def _check_ids(self) -> None:
        raise NotImplementedError

    def check(self, num_embeddings: int) -> None:
        """See `Vocabulary.check`."""
        self._check_ids()
        for begin in range(0, len(self.rows_U), _SCAN_ROWS):
            if (self.rows_U[begin : begin + _SCAN_ROWS] >= num_embeddings).any():
                raise DamagedArtifactError(f"the vocabulary names a row outside the table's {num_embeddings}")


class Int64Vocabulary(_ListVocabulary, HasNative):
    """A sorted list of ids, and the row of each.

    Args:
        ids_U: ids, strictly ascending (int64).
        rows_U: ids_U[i] lives in row rows_U[i] (uint32). Several ids may share a row.
        tree_T: their `id_tree` (int64); none is slower.
    """

    kind = "int64"

    def __init__(
        self, ids_U: NDArray[np.int64], rows_U: NDArray[np.uint32], tree_T: NDArray[np.int64] | None = None
    ) -> None:
        if ids_U.ndim != 1 or ids_U.shape != rows_U.shape:
            raise ConfigError(f"vocabulary: got ids {ids_U.shape} and rows {rows_U.shape}, want two equal lengths")
        _check_index("id_tree", tree_T, np.int64, id_kernels.num_tree_keys(len(ids_U)))
        self.ids_U, self.rows_U, self.tree_T = ids_U, rows_U, tree_T

    @classmethod
    def from_pairs(cls, ids_U: Sequence[Any] | NDArray[Any], rows_U: Sequence[int] | NDArray[Any] | None) -> Self:
        """See `_ListVocabulary.from_pairs`."""
        ids = int64_ids(ids_U)
        rows, order_U = _uint32_rows(rows_U, len(ids)), np.argsort(ids)
        sorted_U = ids[order_U]
        if (sorted_U[1:] == sorted_U[:-1]).any():
            raise _stands_twice(sorted_U[:-1][sorted_U[1:] == sorted_U[:-1]][0])
        return cls(sorted_U, rows[order_U], id_kernels.build_tree(sorted_U))

    @functools.cached_property
    def native(self) -> _native.Integers:
        """The list as the kernels take it."""
        return id_kernels.sorted_integers(self.ids_U, self.rows_U, self.tree_T)

    def rows(self, ids: Any) -> NDArray[np.int64]:
        """See `Vocabulary.rows`."""
        return find_integer_rows(int64_ids(ids), self.native)

    def _ids_at(self, entries_N: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.ids_U[entries_N]

    def indexed(self) -> Int64Vocabulary:
        """See `Vocabulary.indexed`."""
        if self.tree_T is not None:
            return self
        return Int64Vocabulary(self.ids_U, self.rows_U, id_kernels.build_tree(self.ids_U))

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """The two lists, and before them the tree, where it has keys: nodes and leaves then begin with a cache line."""
        tree = {} if self.tree_T is None or not len(self.tree_T) else {"id_tree": self.tree_T}
        return {**tree, "ids": self.ids_U, "rows": self.rows_U}

    def _check_ids(self) -> None:
        for begin in range(0, len(self.ids_U), _SCAN_ROWS):
            ids_N = self.ids_U[begin : begin + _SCAN_ROWS + 1]
            if (ids_N[1:] <= ids_N[:-1]).any():
                raise DamagedArtifactError("the vocabulary's ids are not strictly ascending")
        if self.tree_T is not None and not np.array_equal(self.tree_T, id_kernels.build_tree(self.ids_U)):
            raise DamagedArtifactError("the vocabulary's id_tree is not that of its ids")


class StringVocabulary(_ListVocabulary):
    """A sorted list of strings, and the row of each.

    Args:
        ids: strictly ascending in the order of their UTF-8 bytes, which is that of their code points.
        rows_U: the row of each (uint32). Several ids may share a row.
        slots_H: their `id_slots` (uint32); none is slower.
    """

    kind = "string"

    def __init__(
        self, ids: PackedStrings, rows_U: NDArray[np.uint32], slots_H: NDArray[np.uint32] | None = None
    ) -> None:
        if len(ids.offsets_U1) != len(rows_U) + 1:
            raise ConfigError(f"vocabulary: got {len(ids.offsets_U1) - 1} ids and {len(rows_U)} rows, want as many")
        _check_index("id_slots", slots_H, np.uint32, id_kernels.num_slots(len(rows_U)))
        self.ids, self.rows_U, self.slots_H = ids, rows_U, slots_H

    @classmethod
    def from_pairs(cls, ids_U: Sequence[Any] | NDArray[Any], rows_U: Sequence[int] | NDArray[Any] | None) -> Self:
        """See `_ListVocabulary.from_pairs`."""
        texts = _utf8(string_ids(ids_U))
        rows = _uint32_rows(rows_U, len(texts))
        order_U = sorted(range(len(texts)), key=texts.__getitem__)
        sorted_U = [texts[i] for i in order_U]
        twice = next((text for text, after in itertools.pairwise(sorted_U) if text == after), None)
        if twice is not None:
            raise _stands_twice(repr(twice.decode()))
        packed = PackedStrings.pack(sorted_U)
        return cls(packed, rows[order_U], id_kernels.build_slots(*packed))

    def rows(self, ids: Any) -> NDArray[np.int64]:
        """See `Vocabulary.rows`. Ids are str in a list or a tuple, or an array of them."""
        return id_kernels.find_string_rows(string_ids(ids), *self.ids, self.rows_U, self.slots_H)

    def _ids_at(self, entries_N: NDArray[np.int64]) -> LazyStrings:
        return LazyStrings(self.ids, entries_N)

    def indexed(self) -> StringVocabulary:
        """See `Vocabulary.indexed`. Slots number fewer than 2**32 ids: more have none."""
        if self.slots_H is not None or len(self.rows_U) > id_kernels.MOST_SLOTTED:
            return self
        return StringVocabulary(self.ids, self.rows_U, id_kernels.build_slots(*self.ids))

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """The UTF-8 of the ids (uint8 [T]), where each begins (int64 [U + 1]), the rows (uint32 [U]) and the slots."""
        slots = {} if self.slots_H is None else {"id_slots": self.slots_H}
        return {"id_bytes": self.ids.bytes_T, "id_offsets": self.ids.offsets_U1, "rows": self.rows_U, **slots}

    def _check_ids(self) -> None:
        at = id_kernels.find_disorder(*self.ids)
        if at is not None:
            raise DamagedArtifactError(f"the vocabulary's ids are not strictly ascending: see number {at}")
        self.ids.check_utf8()
        if self.slots_H is not None and not np.array_equal(self.slots_H, id_kernels.build_slots(*self.ids)):
            raise DamagedArtifactError("the vocabulary's id_slots are not those of its ids")


def _utf8(ids: Sequence[Any]) -> list[bytes]:
    wrong = next((at for at, text in enumerate(ids) if not isinstance(text, str)), None)
    if wrong is not None:
        raise IdTypeError(f"ids: got {type(ids[wrong]).__name__} at position {wrong}, want a flat list of strings")
    try:
        return [text.encode() for text in ids]
    except UnicodeEncodeError as error:
        raise IdTypeError(f"ids: got {error.object!r}, half a surrogate pair: want text that UTF-8 can hold") from error


def _uint32_rows(rows: Sequence[int] | NDArray[Any] | None, num_ids: int) -> NDArray[np.uint32]:
    rows_U = np.arange(num_ids) if rows is None else int64_ids(rows)
    if len(rows_U) != num_ids:
        raise ConfigError(f"vocabulary: got {num_ids} ids and {len(rows_U)} rows, want as many")
    if num_ids and not 0 <= rows_U.min() <= rows_U.max() < _MOST_ROWS:
        raise ConfigError(f"vocabulary: got rows {rows_U.min()} to {rows_U.max()}, want 0 to {_MOST_ROWS - 1}")
    return rows_U.astype(np.uint32)


def _stands_twice(wrong: object) -> ConfigError:
    return ConfigError(f"vocabulary: id {wrong!s} stands in two rows, or twice in one: give each id once")


def _check_index(name: str, index: NDArray[Any] | None, dtype: type[Any], length: int) -> None:
    if index is not None and (index.dtype != dtype or index.shape != (length,)):
        raise ConfigError(f"vocabulary: {name}: got {index.dtype} {index.shape}, want {dtype.__name__} ({length},)")


def load_vocabulary(kind: str, num_embeddings: int, tensors: Mapping[str, NDArray[Any]]) -> Vocabulary:
    """The vocabulary that a table's manifest entry and tensors describe.

    Raises:
        ArtifactError: a kind that this version does not know.
        DamagedArtifactError: its tensors are missing or of the wrong type.
    """
    if kind not in ("identity", "modulo", "int64", "string"):
        raise ArtifactError(f"vocabulary kind: got {kind!r:.40}, this version reads identity, modulo, int64 and string")
    try:
        if kind in ("identity", "modulo"):
            return (IdentityVocabulary if kind == "identity" else ModuloVocabulary)(num_embeddings)
        rows_U, ids_U = tensors.get("rows"), tensors.get("ids")
        if rows_U is None or rows_U.dtype != np.uint32 or rows_U.ndim != 1:
            raise DamagedArtifactError(f"the {kind} vocabulary has no tensor rows, uint32 [U]")
        if kind == "int64":
            if ids_U is None or ids_U.dtype != np.int64:
                raise DamagedArtifactError("the int64 vocabulary has no tensor ids, int64 [U]")
            return Int64Vocabulary(ids_U, rows_U, tensors.get("id_tree"))
        bytes_T, offsets_U1 = tensors.get("id_bytes"), tensors.get("id_offsets")
        if bytes_T is None or offsets_U1 is None:
            raise DamagedArtifactError("the string vocabulary needs the tensors id_bytes and id_offsets")
        ids = PackedStrings(bytes_T, offsets_U1)
        ids.check_arrays()
        return StringVocabulary(ids, rows_U, tensors.get("id_slots"))
    except ConfigError as error:  # what would be a caller's mistake is damage in a file
        raise DamagedArtifactError(str(error)) from error
