"""Bodies of the HTTP API. In: headers and bytes. Out: ids; and back, lookups to bytes."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from dpq_rec import Lookup
from dpq_rec.wire import CODES, ID_BYTES, Buffer, PackedRows, to_bytes
from service.errors import InvalidRequestError, MalformedError, NotAcceptableError, UnsupportedMediaTypeError
from service.messages import SearchAnswer

JSON = "application/json"
OCTETS = "application/octet-stream"
ARROW = "application/vnd.apache.arrow.stream"
Ids = NDArray[np.int64] | list[str]
_WEIGHT = re.compile(r"0(\.[0-9]*)?|1(\.0*)?|\.[0-9]+")
_POSITION_BYTES, _LENGTH_BYTES = 4, 4
_MOST_LENGTH = 1 << 32  # of a bag, as in the other forms
_MOST_HEADERS = 1024  # of a kind, that are kept
_SEARCH_FIELDS = ("queries", "ids", "k", "similarity")


class Headers(dict[str, str]):
    """Headers of replies of one media type and length; made once, for one reply is much like another.

    Args:
        media_type: of the body.
        num_bytes: of the body.
        named: the headers beside these.
    """

    def __init__(self, media_type: str, num_bytes: int, named: Mapping[str, str]) -> None:
        super().__init__(named)
        all_named = {**named, "Content-Length": str(num_bytes), "Content-Type": media_type}
        self.media_type = media_type
        self.raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in all_named.items()]
        self.lines = b"".join(b"%b: %b\r\n" % pair for pair in self.raw) + b"\r\n"  # and the line that ends them


class Reply(NamedTuple):
    """A body and its headers."""

    body: Buffer
    headers: Headers


def body_type(content_type: str | None, offered: tuple[str, ...] = (JSON, OCTETS)) -> str:
    """The media type of a body, without its parameters.

    Raises:
        UnsupportedMediaTypeError: none, or one that is not offered.
    """
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type not in offered:
        got = repr(media_type) if media_type else "none"
        raise UnsupportedMediaTypeError(f"Content-Type: got {got}, want {' or '.join(offered)}")
    return media_type


def reply_type(accept: str, offered: tuple[str, ...] = (JSON, OCTETS)) -> str:
    """The media type of the reply: the offered one that `accept` prefers, the first of equals.

    Args:
        accept: the Accept header; "" is */*.
        offered: media types.

    Raises:
        NotAcceptableError: it accepts none of them.
    """
    qualities = _accepted(accept or "*/*")

    def quality(media_type: str) -> float:
        ranges = (media_type, media_type.partition("/")[0] + "/*", "*/*")
        return next((qualities[r] for r in ranges if r in qualities), 0.0)

    best = max(offered, key=quality)
    if quality(best) <= 0:
        raise NotAcceptableError(f"Accept: got {accept!r}, this is offered: {', '.join(offered)}")
    return best


def _accepted(accept: str) -> dict[str, float]:
    """Media range -> quality."""
    qualities = {}
    for part in accept.split(","):
        media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weights = [text.partition("=")[2].strip() for text in parameters if text.partition("=")[0].strip() == "q"]
        if weights and not _WEIGHT.fullmatch(weights[0]):
            raise NotAcceptableError(f"Accept: got q={weights[0]!r}, want a number from 0 to 1")
        qualities[media_range] = float(weights[0]) if weights else 1.0
    return qualities


def ids_from_octets(body: bytes) -> NDArray[np.int64]:
    """Ids [N] (int64) of little-endian bytes.

    Raises:
        MalformedError: no multiple of 8 bytes.
    """
    check_octets(body)
    return np.frombuffer(body, "<i8").astype(np.int64, copy=False)


def check_octets(body: bytes) -> None:
    """See that a body holds whole ids.

    Raises:
        MalformedError: no multiple of 8 bytes.
    """
    if len(body) % ID_BYTES:
        raise MalformedError(f"body: got {len(body)} bytes, want a multiple of {ID_BYTES}: little-endian int64 ids")


def bags_from_octets(body: bytes, num_bags: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids [N] and bag lengths [B] (int64): little-endian int64, then a uint32 for each bag.

    Raises:
        MalformedError: another number of bytes.
    """
    at = len(body) - _LENGTH_BYTES * num_bags
    if at < 0 or at % ID_BYTES:
        wanted = f"a multiple of {ID_BYTES} for the ids, and {_LENGTH_BYTES * num_bags} for the lengths of the bags"
        raise MalformedError(f"body: got {len(body)} bytes, want {wanted}, of which num_bags says {num_bags}")
    return ids_from_octets(body[:at]), np.frombuffer(body[at:], "<u4").astype(np.int64)


def bags_from_json(body: bytes) -> tuple[Ids, NDArray[np.int64]]:
    """Ids and bag lengths [B] (int64) of `{"ids": [...], "bag_lengths": [...]}`.

    Raises:
        MalformedError: no JSON.
        InvalidRequestError: JSON of another form.
    """
    asked = _fields(_parsed(body), "body", ("ids", "bag_lengths"))
    lengths_B = _ids_of(asked["bag_lengths"], "bag_lengths")
    if isinstance(lengths_B, list) or (len(lengths_B) and not 0 <= lengths_B.min() <= lengths_B.max() < _MOST_LENGTH):
        raise InvalidRequestError(f"bag_lengths: want integers from 0 to {_MOST_LENGTH - 1}")
    return _ids_of(asked["ids"], "ids"), lengths_B


def ids_from_json(body: bytes) -> Ids:
    """Ids of `{"ids": [...]}`.

    Raises:
        MalformedError: no JSON.
        InvalidRequestError: JSON of another form.
    """
    return _ids_of(_object(_parsed(body), "body", "ids"), "ids")


def search_from_json(body: bytes) -> dict[str, Any]:
    """Fields of a `SearchRequest` of `{"queries": [[...]]}` or `{"ids": [...]}`, with `k` and `similarity` if given.

    Raises:
        MalformedError: no JSON.
        InvalidRequestError: JSON of another form.
    """
    asked = _parsed(body)
    if not isinstance(asked, dict):
        raise InvalidRequestError(f"body: got {_name_of(asked)}, want an object with 'queries' or 'ids'")
    if others := ", ".join(repr(name) for name in asked if name not in _SEARCH_FIELDS):
        raise InvalidRequestError(f"body: got {others}, want some of {', '.join(_SEARCH_FIELDS)}")
    if "k" in asked and type(asked["k"]) is not int:
        raise InvalidRequestError(f"k: got {_name_of(asked['k'])}, want an integer")
    queries = asked.get("queries", [])
    if not isinstance(queries, list) or not all(isinstance(query, list) for query in queries):
        raise InvalidRequestError("queries: want a list of vectors, each a list of numbers")
    if not {type(number) for query in queries for number in query} <= {int, float}:
        raise InvalidRequestError("queries: got something else than numbers in a vector")
    return {**asked, "ids": _ids_of(asked["ids"], "ids")} if "ids" in asked else asked


def search_to_json(table: str, answer: SearchAnswer, ids_as: Literal["number", "string"] = "number") -> bytes:
    """`{"table", "version", "ids", "scores", "missing"}`: a list of each query, empty where its id is unknown."""
    found = list(answer.by_query())
    if ids_as == "string":
        found = [(list(map(str, ids_T)), scores_T) for ids_T, scores_T in found]
    return to_json(
        {
            "table": table,
            "version": answer.version,
            "ids": [ids_T for ids_T, _ in found],
            "scores": [scores_T for _, scores_T in found],
            "missing": answer.missing,
        }
    )


def tables_from_json(body: bytes) -> dict[str, Ids]:
    """Table -> ids of `{"tables": {NAME: {"ids": [...]}}}`.

    Raises:
        MalformedError: no JSON.
        InvalidRequestError: JSON of another form.
    """
    tables = _object(_parsed(body), "body", "tables")
    if not isinstance(tables, dict):
        raise InvalidRequestError(f"tables: got {_name_of(tables)}, want an object of table names")
    return {
        name: _ids_of(_object(entry, f"tables.{name}", "ids"), f"tables.{name}.ids") for name, entry in tables.items()
    }


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedError(f"body: got no JSON: {error}") from None


def _object(value: Any, where: str, field: str) -> Any:
    """value[field] of an object that holds that field and no other."""
    return _fields(value, where, (field,))[field]


def _fields(value: Any, where: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """An object that holds these fields and no other."""
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where}: got {_name_of(value)}, want an object with {_listed(fields)}")
    if absent := [field for field in fields if field not in value]:
        raise InvalidRequestError(f"{where}: got no {_listed(absent)}")
    if others := [name for name in value if name not in fields]:
        wanted = f"{_listed(fields)} alone; dtype, missing and pooling stand in the query"
        raise InvalidRequestError(f"{where}: got {', '.join(map(repr, others))}, want {wanted}")
    return value


def _listed(fields: Sequence[str]) -> str:
    return " and ".join(map(repr, fields))


def _ids_of(value: Any, where: str) -> Ids:
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


def to_json(value: Any) -> bytes:
    """JSON of anything, arrays included. It has no NaN and no infinity: they become null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def lookup_to_octets(version: str, lookup: Lookup) -> Reply:
    """The octets of vectors and missing positions."""
    vectors_NE, missing = lookup
    num_rows, dim = vectors_NE.shape
    headers = octets_headers(version, num_rows, dim, vectors_NE.dtype.name, len(missing))
    return Reply(to_bytes(vectors_NE, missing), headers)


@functools.lru_cache(_MOST_HEADERS)
def octets_headers(version: str, num_rows: int, dim: int, dtype_name: str, num_missing: int) -> Headers:
    """Headers of vectors and missing positions."""
    dtype = np.dtype(dtype_name)
    named = {
        "X-Num-Rows": str(num_rows),
        "X-Dim": str(dim),
        "X-Dtype": dtype.name,
        "X-Num-Missing": str(num_missing),
        "X-Version": version,
    }
    return Headers(OCTETS, num_rows * dim * dtype.itemsize + _POSITION_BYTES * num_missing, named)


def codes_to_octets(version: str, rows: PackedRows) -> Reply:
    """The octets of packed codes, missing positions and tiers."""
    packed_NW, missing, tiers_N = rows
    headers = codes_headers(version, *packed_NW.shape, len(missing), has_tiers=tiers_N is not None)
    return Reply(to_bytes(*rows), headers)


@functools.lru_cache(_MOST_HEADERS)
def codes_headers(version: str, num_rows: int, row_bytes: int, num_missing: int, *, has_tiers: bool) -> Headers:
    """Headers of packed codes, missing positions and, of a table that has some, tiers."""
    named = {
        "X-Num-Rows": str(num_rows),
        "X-Row-Bytes": str(row_bytes),
        "X-Num-Missing": str(num_missing),
        "X-Version": version,
    }
    return Headers(CODES, num_rows * (row_bytes + has_tiers) + _POSITION_BYTES * num_missing, named)
