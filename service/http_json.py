"""Lookups as JSON. In: TableRequests. Out: bodies, `{"table", "version", "dim", "vectors", "missing"}`.

To write a number takes many times as long as to find it. A table of codes has few different numbers, in groups that
many rows share: their texts are written at its first lookup, and replies are copied together from them. Vectors that
are sums of groups (several levels, bags) or that are stored as they are have no such texts, and are written one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from dpq_rec import Lookup
from dpq_rec.kernels import Coded
from dpq_rec.kernels.json_texts import JsonTexts, decode_to_json
from dpq_rec.table import Rows, VectorType
from service.engine import Engine
from service.http_format import to_json
from service.messages import TableRequest

_PIECE_VALUES = 1 << 16  # values written as JSON at a time: orjson keeps every other thread waiting
# Values of a table whose texts are kept, in each of the two types: as many take 10 milliseconds at the first lookup,
# which others wait for, and 6 MB of each worker. More would be felt, and hundreds of MB where there are 65,536 codes.
_MOST_TEXT_VALUES = 1 << 18


class JsonLookups:
    """What an engine finds, as JSON."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._texts = functools.cache(self._write_texts)  # two threads may write the same ones: either's will do

    def has_texts(self, table: str) -> bool:
        """Whether a table's vectors are copied together from texts; else every number is written."""
        return _has_texts(self._engine.table(table).vectors)

    def of_one(self, request: TableRequest) -> bytes:
        """The body of one request's reply.

        Raises:
            UnknownTableError, UnknownIdsError, IdTypeError, InvalidRequestError, TooManyIdsError: as `Engine.lookup`.
            DamagedArtifactError: a row's codes are not what was published.
        """
        if request.pooling == "none":
            return self._body(request, self._engine.find_rows([request])[0])
        version, (pooled,) = self._engine.lookup([request])
        return lookup_to_json(request.table, version, pooled)

    def of_several(self, requests: Sequence[TableRequest]) -> bytes:
        """`{"version", "tables": {NAME: what `of_one` gives}}` of requests without bags, all from one version.

        Raises:
            UnknownTableError and so on: as `of_one`.
        """
        found = self._engine.find_rows(requests)
        replies = zip(requests, found, strict=True)
        entries = b",".join(b"%b:%b" % (to_json(asked.table), self._body(asked, rows)) for asked, rows in replies)
        return b'{"version":%b,"tables":{%b}}' % (to_json(self._engine.store.version), entries)

    def _body(self, request: TableRequest, found: Rows) -> bytes:
        body = self._write(request, found)
        self._engine.metrics.looked_up(request.table, len(request.ids), len(found.missing))
        return body

    def _write(self, request: TableRequest, found: Rows) -> bytes:
        table, version = self._engine.table(request.table), self._engine.store.version
        texts, stored = self._texts(table.name, request.dtype), table.vectors
        if texts is None or not isinstance(stored, Coded):
            vectors_NE = table.decode(found.rows_N, dtype=request.dtype)
            return lookup_to_json(table.name, version, Lookup(vectors_NE, found.missing))
        before, after = _around(table.name, version, stored.embedding_dim, found.missing)
        return decode_to_json(stored, texts, found.rows_N, before=before, after=after)

    def _write_texts(self, name: str, dtype: VectorType) -> JsonTexts | None:
        """The texts of a table's values; None where its vectors are not made of them, or they are too many."""
        stored = self._engine.table(name).vectors
        return JsonTexts.of(stored, dtype, _to_items) if _has_texts(stored) else None


def _has_texts(stored: object) -> TypeGuard[Coded]:
    return isinstance(stored, Coded) and stored.layout.num_levels == 1 and stored.values_MKS.size <= _MOST_TEXT_VALUES


def lookup_to_json(table: str, version: str, lookup: Lookup) -> bytes:
    """The body of a lookup whose vectors are at hand."""
    before, after = _around(table, version, lookup.vectors.shape[1], lookup.missing)
    return b"".join((before, _to_items(lookup.vectors), after))


def _around(table: str, version: str, dim: int, missing: NDArray[np.uint32]) -> tuple[bytes, bytes]:
    """What stands before and after the vectors."""
    before = b'{"table":%b,"version":%b,"dim":%d,"vectors":[' % (to_json(table), to_json(version), dim)
    return before, b'],"missing":%b}' % to_json(missing)


def _to_items(array: NDArray[Any]) -> bytes:
    """JSON of the items of an array, with commas between them."""
    step = max(1, _PIECE_VALUES // math.prod(array.shape[1:]))
    return b",".join(to_json(array[start : start + step])[1:-1] for start in range(0, len(array), step))
