"""Lookups of one table over HTTP. In: a path, a query, two headers and a body. Out: a Reply.

What does not depend on the body is settled once, in a LookupHandler: clients ask for the same again and again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import Headers
from starlette.types import Scope

from dpq_rec.table import MissingPolicy, Table, VectorType
from dpq_rec.wire import CODES, ID_BYTES, to_bytes
from service.auth import check_key
from service.engine import INLINE_VALUES, Engine
from service.errors import (
    ERROR_CODES,
    InvalidRequestError,
    NotAcceptableError,
    UnsupportedMediaTypeError,
)
from service.http_bodies import (
    ARROW,
    BINARY,
    JSON,
    Reply,
    bags_from_binary,
    bags_from_json,
    check_ids,
    codes_head,
    has_texts,
    header_lines,
    ids_from_binary,
    ids_from_json,
    load_pyarrow,
    lookup_to_arrow,
    lookup_to_json,
    lookups_to_json,
    refusal,
    vectors_head,
)
from service.http_parser import Head
from service.messages import Pooling, TableRequest

ROUTE = "/v1/tables/{table}/lookup"
LOOKUP = f"POST {ROUTE}"
HOW_TO_SEND_A_KEY = "send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
_PATH = re.compile(r"/v1/tables/([^/]+)/lookup", re.DOTALL)
_NOT_UNESCAPED = re.compile(rb"%(?:2F|[01][0-9A-F]|7F)", re.IGNORECASE)
_WEIGHT = re.compile(r"0(\.[0-9]*)?|1(\.0*)?|\.[0-9]+")
# A number that is written as JSON takes as long as so many that are decoded and copied.
WRITTEN_VALUE = 8
_READ_ID = 32  # and as many, to read an id of JSON


class LookupQuery(BaseModel):
    """Parameters of a lookup; `num_bags` is how many bags a binary body has."""

    model_config = ConfigDict(frozen=True)

    dtype: VectorType = "float32"
    missing: MissingPolicy = "zeros"
    pooling: Pooling = "none"
    num_bags: Annotated[
        Annotated[int, Field(ge=0, le=10**9 - 1)] | SkipJsonSchema[None],  # OpenAPI 3.0 has no null
        Query(description=f"With pooling, how many lengths follow the ids in {BINARY}"),
    ] = None


class LookupHandler:
    """Answers lookups that differ in their bodies alone: of one table, query and pair of media types.

    Args:
        engine: what finds the vectors.
        name: the table's.
        query: what else is asked for.
        headers: Content-Type and Accept say what a body and its reply look like.

    Raises:
        UnknownTableError: no such table.
        NotReadyError: its file was damaged.
        UnsupportedMediaTypeError: a body type that is not read.
        NotAcceptableError: a reply type that is not offered.
        InvalidRequestError: parameters that contradict each other.
    """

    def __init__(self, engine: Engine, name: str, query: LookupQuery, headers: Headers) -> None:
        self._engine, self._name, self._query = engine, name, query
        self._table = table = engine.table(name)
        self._version, self._dim = engine.version, table.manifest.embedding_dim
        self._given = given = body_type(headers)
        if given == BINARY and table.vocabulary.kind == "string":
            raise UnsupportedMediaTypeError(f"Content-Type: table {name!r} has string ids; send them as {JSON}")
        self._wanted = wanted = _lookup_reply_type(headers, table, query.pooling)
        _check_num_bags(query, given)
        if wanted == CODES and query.dtype != "float32":
            raise InvalidRequestError(f"dtype: got {query.dtype} with codes, which have none; cast what they decode to")
        if wanted == ARROW:
            load_pyarrow()
        is_plain = given == BINARY and query.pooling == "none" and wanted in (BINARY, CODES)
        self._answer = self._binary_to_binary if is_plain else _ANSWERS[wanted].__get__(self)
        if wanted == CODES:
            self._row_bytes, self._has_tiers = table.manifest.layout.row_bytes, len(table.tiers) > 1
        is_written = wanted == JSON and (query.pooling != "none" or not has_texts(table.vectors))
        self._values_per_id = self._dim * WRITTEN_VALUE if is_written else self._dim

    def num_values(self, body: bytes) -> int:
        """What the reply to a body takes at most, in values of binary vectors that take as long."""
        if self._given == JSON:
            return values_of_json(body, self._values_per_id)
        return len(body) // ID_BYTES * self._values_per_id

    def answer(self, body: bytes) -> Reply:
        """The reply to a body.

        Raises:
            MalformedError, InvalidRequestError: it is not what is read.
            UnknownIdsError, IdTypeError, TooManyIdsError, DamagedArtifactError: as `Engine.lookup`.
        """
        return self._answer(body)

    def fast_answer(self, num_bytes: int) -> Callable[[bytes], Reply | None] | None:
        """As `answer`, of bodies of so many bytes, on the event loop; a refusal is a reply, too.

        Returns:
            None where they ask for too much; or a function that gives None where one does, if that cannot be told yet.
        """
        if self._given == JSON:
            return lambda body: None if self.num_values(body) > INLINE_VALUES else self._reply(body)
        return None if num_bytes // ID_BYTES * self._values_per_id > INLINE_VALUES else self._reply

    def _reply(self, body: bytes) -> Reply:
        try:
            return self._answer(body)
        except Exception as error:
            return refusal(error, LOOKUP)

    def _binary_to_binary(self, body: bytes) -> Reply:
        """The shortest way, from bytes to bytes."""
        num_ids, num_over = divmod(len(body), ID_BYTES)
        if num_over:
            check_ids(body)
        query = self._query
        if self._wanted == CODES:
            reply, num_missing = self._engine.lookup_bytes(self._name, body, "codes", query.missing)
            return Reply(
                reply, codes_head(self._version, num_ids, self._row_bytes, num_missing, has_tiers=self._has_tiers)
            )
        reply, num_missing = self._engine.lookup_bytes(self._name, body, query.dtype, query.missing)
        return Reply(reply, vectors_head(self._version, num_ids, self._dim, query.dtype, num_missing))

    def _to_vectors(self, body: bytes) -> Reply:
        ((vectors_NE, missing),) = self._engine.lookup([self._request(body)])
        head = vectors_head(self._version, len(vectors_NE), self._dim, self._query.dtype, len(missing))
        return Reply(to_bytes(vectors_NE, missing), head)

    def _to_codes(self, body: bytes) -> Reply:
        rows = self._engine.lookup_codes(self._name, self._request(body).ids, self._query.missing)
        num_ids, num_missing = len(rows.packed_NW), len(rows.missing)
        head = codes_head(self._version, num_ids, self._row_bytes, num_missing, has_tiers=self._has_tiers)
        return Reply(to_bytes(*rows), head)

    def _to_json(self, body: bytes) -> Reply:
        request = self._request(body)
        if request.pooling == "none":
            (text,) = lookups_to_json(self._engine, [request])
        else:
            text = lookup_to_json(self._name, self._version, self._engine.lookup([request])[0])
        return Reply(text, header_lines(JSON, len(text)))

    def _to_arrow(self, body: bytes) -> Reply:
        request = self._request(body)
        return lookup_to_arrow(self._table, self._version, request.ids, self._engine.lookup([request])[0])

    def _request(self, body: bytes) -> TableRequest:
        query = self._query
        if query.pooling == "none":
            ids = ids_from_binary(body) if self._given == BINARY else ids_from_json(body)
            return TableRequest(self._name, ids, query.dtype, query.missing)
        bags = bags_from_json(body) if query.num_bags is None else bags_from_binary(body, query.num_bags)
        return TableRequest(self._name, bags[0], query.dtype, query.missing, query.pooling, bags[1])


_ANSWERS: dict[str, Callable[[LookupHandler, bytes], Reply]] = {  # in the order in which they are offered
    JSON: LookupHandler._to_json,
    BINARY: LookupHandler._to_vectors,
    CODES: LookupHandler._to_codes,
    ARROW: LookupHandler._to_arrow,
}


def fast_answer(engine: Engine, head: Head) -> Callable[[bytes], Reply | None] | None:
    """What answers a lookup on the event loop, from its body; None for what FastAPI is to answer.

    The result gives None, likewise, where the body asks for too much.
    """
    scope, settings = head.scope, engine.settings
    path, num_bytes = _PATH.fullmatch(route_path(scope)), head.num_bytes
    if path is None or scope["method"] != "POST" or not head.keeps_alive or head.waits:
        return None
    if num_bytes is None or num_bytes > settings.body_limit_bytes:
        return None
    pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    given = dict(pairs)
    if len(given) < len(pairs) or not given.keys() <= LookupQuery.model_fields.keys():
        return None
    try:
        if settings.api_key is not None:
            check_key(scope["headers"], settings.api_key.encode(), HOW_TO_SEND_A_KEY)
        headers = Headers(raw=scope["headers"])
        handler = LookupHandler(engine, path[1], LookupQuery.model_validate(given), headers)
        check_encoding(headers)
    except ValidationError:
        return None
    except tuple(ERROR_CODES) as error:
        refused = refusal(error, LOOKUP)
        return lambda body: refused
    return handler.fast_answer(num_bytes)


def route_path(scope: Scope) -> str:
    """The path by which a route is found, without what is escaped in it.

    A slash or a control character that is escaped stays so: it is no part of any route, and must not become one.
    """
    path: str = scope["path"]
    raw: bytes = scope.get("raw_path") or b""
    return raw.decode("latin-1") if b"%" in raw and _NOT_UNESCAPED.search(raw) else path


def values_of_json(body: bytes, values_per_id: int) -> int:
    """As `LookupHandler.num_values`: ids may be of a digit each, and commas tell how many there are at most."""
    return (body.count(b",") + 1) * (values_per_id + _READ_ID) + len(body)


# Headers


def check_encoding(headers: Headers) -> None:
    """See that a body is sent as it is.

    Raises:
        UnsupportedMediaTypeError: it is compressed, or encoded otherwise.
    """
    for value in headers.getlist("content-encoding"):
        for encoding in map(str.strip, value.split(",")):
            if encoding.lower() not in ("", "identity"):
                raise UnsupportedMediaTypeError(f"Content-Encoding: got {encoding!r}, want identity: the body as it is")


def body_type(headers: Headers, offered: Sequence[str] = (JSON, BINARY)) -> str:
    """The media type of a body, without its parameters.

    Raises:
        UnsupportedMediaTypeError: none, or one that is not offered.
    """
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in offered:
        got = repr(media_type) if media_type else "none"
        raise UnsupportedMediaTypeError(f"Content-Type: got {got}, want {' or '.join(offered)}")
    return media_type


def reply_type(headers: Headers, offered: Sequence[str] = (JSON, BINARY)) -> str:
    """The media type of the reply: the offered one that Accept prefers, the first of equals. No Accept is */*.

    Raises:
        NotAcceptableError: it accepts none of them.
    """
    accept = ",".join(filter(None, headers.getlist("accept")))
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


def _lookup_reply_type(headers: Headers, table: Table, pooling: Pooling) -> str:
    """As `reply_type`, of the forms that there are of a table; it says why one is not offered that is elsewhere."""
    whys = {}
    if not table.manifest.has_codes:
        whys[CODES] = f"table {table.name!r} is of kind {table.manifest.kind!r} and has no codes"
    if pooling != "none":
        whys |= dict.fromkeys((CODES, ARROW), "bags have no ids and no codes: pooling gives vectors alone")
    try:
        return reply_type(headers, [form for form in _ANSWERS if form not in whys])
    except NotAcceptableError as error:
        accept = ",".join(headers.getlist("accept")).lower()
        why = "".join(f"; {why}" for form, why in whys.items() if form in accept)
        raise NotAcceptableError(f"{error}{why}") from None


def _check_num_bags(query: LookupQuery, given: str) -> None:
    needs_number = query.pooling != "none" and given == BINARY
    if needs_number and query.num_bags is None:
        raise InvalidRequestError("num_bags: got none; with pooling, say in the query how many lengths follow the ids")
    if not needs_number and query.num_bags is not None:
        raise InvalidRequestError(f"num_bags: got {query.num_bags}, want it with pooling of {BINARY} alone")
