"""Bodies of the HTTP API. In: those of requests; what an engine found, or an exception. Out: ids; Replies.

To write a number as JSON takes many times as long as to find it. A table of codes has few different numbers, in groups
that many rows share: their texts are written at its first lookup, and replies are copied together from them. Vectors
that are sums of groups (several levels, bags) or that are stored as they are have no such texts, and are written one by
one.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
import orjson
from fastapi import Response
from numpy.typing import NDArray

from dpq_rec import DamagedArtifactError, Lookup
from dpq_rec.kernels import Coded
from dpq_rec.kernels.lookup import JsonTexts, decode_to_json
from dpq_rec.table import Rows, Table, VectorType
from dpq_rec.wire import CODES, ID_BYTES, Buffer
from service.engine import Engine
from service.errors import (
    ERROR_CODES,
    INTERNAL,
    InvalidRequestError,
    MalformedError,
    NotAcceptableError,
    NotReadyError,
    OverloadedError,
    TooManyBytesError,
    UnauthorizedError,
)
from service.messages import SearchReply, TableRequest

JSON = "application/json"
BINARY = "application/octet-stream"
ARROW = "application/vnd.apache.arrow.stream"
Ids = NDArray[np.int64] | list[str]
logger = logging.getLogger("service.http")
_MOST_ERROR_TEXT = 2000  # characters of an error: what it repeats of a request may be megabytes
_ERROR_HEADERS: dict[type[Exception], dict[str, str]] = {
    UnauthorizedError: {"WWW-Authenticate": "Bearer"},
    OverloadedError: {"Retry-After": "1"},
    NotReadyError: {"Retry-After": "1"},
    TooManyBytesError: {"Connection": "close"},  # what is left of the body is not worth reading
}
_POSITION_BYTES, _LENGTH_BYTES = 4, 4
_MOST_HEADS = 1024  # of replies, that are kept
_SEARCH_FIELDS = ("queries", "ids", "k", "similarity")
_PIECE_VALUES = 1 << 16  # values written as JSON at a time: orjson keeps every other thread waiting
# Values of a table whose texts are kept, in each of the two types: as many take 10 milliseconds at the first lookup,
# which others wait for, and 6 MB of each worker. More would be felt, and hundreds of MB where there are 65,536 codes.
_MOST_TEXT_VALUES = 1 << 18


class Reply(NamedTuple):
    """A reply as it is sent.

    Attributes:
        body: bytes, not copied.
        head: the header lines of `header_lines`.
        status: 200, or an error's.
    """

    body: Buffer
    head: bytes
    status: int = 200

    def response(self) -> Response:
        """The same for ASGI."""
        lines = self.head.split(b"\r\n")[:-2]
        response = Response(self.body, self.status)
        response.raw_headers = [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]
        return response


def header_lines(media_type: str, num_bytes: int, named: Mapping[str, object] = MappingProxyType({})) -> bytes:
    """Headers of a body as HTTP/1.1 has them, and the empty line that ends them."""
    lines = "".join(f"{name.lower()}: {value}\r\n" for name, value in named.items()) if named else ""
    return f"{lines}content-length: {num_bytes}\r\ncontent-type: {media_type}\r\n\r\n".encode("latin-1")


@functools.lru_cache(_MOST_HEADS)
def vectors_head(version: str, num_rows: int, dim: int, dtype: VectorType, num_missing: int) -> bytes:
    """Header lines of vectors and missing positions."""
    num_bytes = num_rows * dim * np.dtype(dtype).itemsize + _POSITION_BYTES * num_missing
    named = {"X-Num-Rows": num_rows, "X-Dim": dim, "X-Dtype": dtype, "X-Num-Missing": num_missing, "X-Version": version}
    return header_lines(BINARY, num_bytes, named)


@functools.lru_cache(_MOST_HEADS)
def codes_head(version: str, num_rows: int, row_bytes: int, num_missing: int, *, has_tiers: bool) -> bytes:
    """Header lines of packed codes, missing positions and, of a table that has some, tiers."""
    num_bytes = num_rows * (row_bytes + has_tiers) + _POSITION_BYTES * num_missing
    named = {"X-Num-Rows": num_rows, "X-Row-Bytes": row_bytes, "X-Num-Missing": num_missing, "X-Version": version}
    return header_lines(CODES, num_bytes, named)


# Errors


def error_reply(status: int, error_type: str, text: str, headers: Mapping[str, str] | None = None) -> Reply:
    """`{"error", "error_type"}`; what is too long of the text is left out."""
    text = text if len(text) <= _MOST_ERROR_TEXT else f"{text[:_MOST_ERROR_TEXT]}…"
    body = orjson.dumps({"error": text, "error_type": error_type})
    return Reply(body, header_lines(JSON, len(body), headers or {}), status)


def refusal(error: Exception, method: str) -> Reply:
    """The reply to whatever was raised: 500, and a line in the log, for what nobody expected. Call it in `except`."""
    status, _, error_type = ERROR_CODES.get(type(error), INTERNAL)
    if error_type != INTERNAL.error_type:
        return error_reply(status, error_type, str(error), _ERROR_HEADERS.get(type(error)))
    logger.exception("%s failed", method)
    is_damage = isinstance(error, DamagedArtifactError)  # which no caller is to blame for
    return error_reply(status, error_type, str(error) if is_damage else "internal error; the server's log says more")


# JSON


def to_json(value: Any) -> bytes:
    """JSON of anything, arrays included. It has no NaN and no infinity: they become null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def search_to_json(table: str, version: str, found: SearchReply, ids_as: Literal["number", "string"]) -> bytes:
    """`{"table", "version", "ids", "scores", "missing"}`: a list of each query, empty where its id is unknown."""
    ids_QT = [ids_T if ids_as == "number" else [*map(str, ids_T)] for ids_T, _ in found.answers]
    scores_QT = [scores_T for _, scores_T in found.answers]
    return to_json({"table": table, "version": version, "ids": ids_QT, "scores": scores_QT, "missing": found.missing})


def lookups_to_json(engine: Engine, requests: Sequence[TableRequest]) -> list[bytes]:
    """The bodies `{"table", "version", "dim", "vectors", "missing"}` of replies to requests without bags.

    Raises:
        UnknownTableError, UnknownIdsError, IdTypeError, TooManyIdsError: as `Engine.lookup`.
        DamagedArtifactError: a row's codes are not what was published.
    """
    bodies = []
    for request, found in zip(requests, engine.find_rows(requests), strict=True):
        bodies.append(_rows_to_json(engine.table(request.table), engine.version, request.dtype, found))
        engine.metrics.looked_up(request.table, len(request.ids), len(found.missing))
    return bodies


def _rows_to_json(table: Table, version: str, dtype: VectorType, found: Rows) -> bytes:
    """Rows of a table, from the texts of its values where it has some."""
    vectors = table.vectors
    if not isinstance(vectors, Coded) or (texts := _texts_of(vectors, dtype)) is None:
        return lookup_to_json(table.name, version, Lookup(table.decode(found.rows_N, dtype=dtype), found.missing))
    before, after = _around(table.name, version, vectors.embedding_dim, found.missing)
    return decode_to_json(vectors, texts, found.rows_N, before=before, after=after)


def has_texts(stored: object) -> TypeGuard[Coded]:
    """Whether a table's vectors are copied together from texts; else every number is written."""
    return isinstance(stored, Coded) and stored.layout.num_levels == 1 and stored.values_MKS.size <= _MOST_TEXT_VALUES


@functools.cache  # two threads may write the same ones: either's will do
def _texts_of(stored: Coded, dtype: VectorType) -> JsonTexts | None:
    return JsonTexts.of(stored, dtype, _items_to_json) if has_texts(stored) else None


def lookup_to_json(table: str, version: str, lookup: Lookup) -> bytes:
    """The body of a lookup whose vectors are at hand."""
    before, after = _around(table, version, lookup.vectors.shape[1], lookup.missing)
    return b"".join((before, _items_to_json(lookup.vectors), after))


def _around(table: str, version: str, dim: int, missing: NDArray[np.uint32]) -> tuple[bytes, bytes]:
    """What stands before and after the vectors."""
    before = b'{"table":%b,"version":%b,"dim":%d,"vectors":[' % (to_json(table), to_json(version), dim)
    return before, b'],"missing":%b}' % to_json(missing)


def _items_to_json(array: NDArray[Any]) -> bytes:
    """JSON of the items of an array, with commas between them."""
    step = max(1, _PIECE_VALUES // math.prod(array.shape[1:]))
    return b",".join(to_json(array[start : start + step])[1:-1] for start in range(0, len(array), step))


# Arrow


def load_pyarrow() -> Any:
    """The module pyarrow.

    Raises:
        NotAcceptableError: it is not installed, so that this form cannot be had.
    """
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        text = f"Accept: {ARROW} needs pyarrow on the server; install it there: pip install 'dpq-rec[arrow]'"
        raise NotAcceptableError(text) from None


def lookup_to_arrow(table: Table, version: str, ids: NDArray[np.int64] | list[str], lookup: Lookup) -> Reply:
    """A stream of one batch; the schema's metadata holds `table` and `version`.

    Its columns are `id` (int64 or string) and `vector` (fixed_size_list of float or halffloat; null where an id is
    missing).
    """
    pa = load_pyarrow()
    vectors_NE, missing = lookup
    num_rows, dim = vectors_NE.shape
    is_missing_N = np.zeros(num_rows, bool)
    is_missing_N[missing] = True
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors_NE.reshape(-1)), dim, mask=pa.array(is_missing_N))
    is_string = table.vocabulary.kind == "string"  # of no ids their type does not tell
    columns = [pa.array(list(ids), pa.string()) if is_string else pa.array(ids, pa.int64()), vectors]
    schema = pa.schema(
        [("id", columns[0].type), ("vector", vectors.type)], metadata={"table": table.name, "version": version}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    body = memoryview(sink.getvalue())
    named = {"X-Num-Rows": num_rows, "X-Num-Missing": len(missing), "X-Version": version}
    return Reply(body, header_lines(ARROW, len(body), named))


# Requests


def check_ids(body: bytes) -> None:
    """See that a binary body holds whole ids.

    Raises:
        MalformedError: no multiple of 8 bytes.
    """
    if len(body) % ID_BYTES:
        raise MalformedError(f"body: got {len(body)} bytes, want a multiple of {ID_BYTES}: little-endian int64 ids")


def ids_from_binary(body: bytes) -> NDArray[np.int64]:
    """Ids [N] (int64) of little-endian bytes.

    Raises:
        MalformedError: as `check_ids`.
    """
    check_ids(body)
    return np.frombuffer(body, "<i8").astype(np.int64, copy=False)


def bags_from_binary(body: bytes, num_bags: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids [N] and bag lengths [B] (int64): little-endian int64, then a uint32 for each bag.

    Raises:
        MalformedError: another number of bytes.
    """
    at = len(body) - _LENGTH_BYTES * num_bags
    if at < 0 or at % ID_BYTES:
        wanted = f"a multiple of {ID_BYTES} for the ids, and {_LENGTH_BYTES * num_bags} for the lengths of the bags"
        raise MalformedError(f"body: got {len(body)} bytes, want {wanted}, of which num_bags says {num_bags}")
    return ids_from_binary(body[:at]), np.frombuffer(body[at:], "<u4").astype(np.int64)


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedError(f"body: got no JSON: {error}") from None


def ids_from_json(body: bytes) -> Ids:
    """Ids of `{"ids": [...]}`.

    Raises:
        MalformedError: no JSON.
        InvalidRequestError: JSON of another form.
    """
    return _checked_ids(_fields(_parsed(body), "body", "ids")["ids"], "ids")


def bags_from_json(body: bytes) -> tuple[Ids, NDArray[np.int64]]:
    """Ids and bag lengths [B] (int64) of `{"ids": [...], "bag_lengths": [...]}`.

    Raises:
        MalformedError, InvalidRequestError: as `ids_from_json`.
    """
    fields = _fields(_parsed(body), "body", "ids", "bag_lengths")
    lengths_B = _checked_ids(fields["bag_lengths"], "bag_lengths")
    if isinstance(lengths_B, list) or (len(lengths_B) and not 0 <= lengths_B.min() <= lengths_B.max() < 1 << 32):
        raise InvalidRequestError(f"bag_lengths: want integers from 0 to {(1 << 32) - 1}")
    return _checked_ids(fields["ids"], "ids"), lengths_B


def search_from_json(body: bytes) -> dict[str, Any]:
    """Fields of a `SearchRequest` of `{"queries": [[...]]}` or `{"ids": [...]}`, with `k` and `similarity` if given.

    Raises:
        MalformedError, InvalidRequestError: as `ids_from_json`.
    """
    fields = _parsed(body)
    if not isinstance(fields, dict):
        raise InvalidRequestError(f"body: got {_name_of(fields)}, want an object with 'queries' or 'ids'")
    if others := ", ".join(repr(name) for name in fields if name not in _SEARCH_FIELDS):
        raise InvalidRequestError(f"body: got {others}, want some of {', '.join(_SEARCH_FIELDS)}")
    if "k" in fields and type(fields["k"]) is not int:
        raise InvalidRequestError(f"k: got {_name_of(fields['k'])}, want an integer")
    queries = fields.get("queries", [])
    if not isinstance(queries, list) or not all(isinstance(query, list) for query in queries):
        raise InvalidRequestError("queries: want a list of vectors, each a list of numbers")
    if not {type(number) for query in queries for number in query} <= {int, float}:
        raise InvalidRequestError("queries: got something else than numbers in a vector")
    return {**fields, "ids": _checked_ids(fields["ids"], "ids")} if "ids" in fields else fields


def tables_from_json(body: bytes) -> dict[str, Ids]:
    """Table -> ids of `{"tables": {NAME: {"ids": [...]}}}`.

    Raises:
        MalformedError, InvalidRequestError: as `ids_from_json`.
    """
    tables = _fields(_parsed(body), "body", "tables")["tables"]
    if not isinstance(tables, dict):
        raise InvalidRequestError(f"tables: got {_name_of(tables)}, want an object of table names")
    ids_of = {name: _fields(entry, f"tables.{name}", "ids")["ids"] for name, entry in tables.items()}
    return {name: _checked_ids(ids, f"tables.{name}.ids") for name, ids in ids_of.items()}


def _fields(value: Any, where: str, *fields: str) -> dict[str, Any]:
    """An object that holds these fields and no other."""
    if isinstance(value, dict) and value.keys() == {*fields}:
        return value
    listed = " and ".join(map(repr, fields))
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where}: got {_name_of(value)}, want an object with {listed}")
    if absent := " and ".join(repr(field) for field in fields if field not in value):
        raise InvalidRequestError(f"{where}: got no {absent}")
    others = ", ".join(repr(name) for name in value if name not in fields)
    wanted = f"{listed} alone; dtype, missing and pooling stand in the query"
    raise InvalidRequestError(f"{where}: got {others}, want {wanted}")


def _checked_ids(value: Any, where: str) -> Ids:
    """Ids of a list that holds only 64-bit integers (no booleans), or only strings."""
    if not isinstance(value, list):
        raise InvalidRequestError(f"{where}: got {_name_of(value)}, want a list")
    types = set(map(type, value))
    if types == {str}:
        return value
    if types - {int}:
        wanted = str if type(value[0]) is str else int
        at = next(i for i, item in enumerate(value) if type(item) is not wanted)
        raise InvalidRequestError(
            f"{where}[{at}]: got {_name_of(value[at])}, want 64-bit integers only, or strings only"
        )
    try:
        return np.array(value, np.int64)
    except OverflowError:
        at = next(i for i, item in enumerate(value) if item >= 1 << 63)
        raise InvalidRequestError(f"{where}[{at}]: got {value[at]}, want a 64-bit integer") from None


def _name_of(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
