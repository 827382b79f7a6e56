"""Lookups of one table over HTTP. In: a path, a query, two headers and a body. Out: a Reply.

What does not depend on the body is settled once and kept as a Plan: the same few are asked for again and again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple, get_args
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from starlette.types import Scope

from dpq_rec.table import MissingPolicy, Table, VectorType
from dpq_rec.wire import CODES, ID_BYTES
from service.engine import Engine
from service.errors import InvalidRequestError, NotAcceptableError, UnsupportedMediaTypeError
from service.http_arrow import load_pyarrow, lookup_to_arrow
from service.http_format import (
    ARROW,
    JSON,
    OCTETS,
    Headers,
    Ids,
    Reply,
    bags_from_json,
    bags_from_octets,
    body_type,
    check_octets,
    codes_headers,
    codes_to_octets,
    ids_from_json,
    ids_from_octets,
    lookup_to_octets,
    octets_headers,
    reply_type,
)
from service.http_json import JsonLookups
from service.messages import Pooling, TableRequest

ROUTE = "/v1/tables/{table}/lookup"
FORMS = (JSON, OCTETS, CODES, ARROW)
_CHOICES = {
    "dtype": ("float32", get_args(VectorType)),
    "missing": ("zeros", get_args(MissingPolicy)),
    "pooling": ("none", get_args(Pooling)),
}
_PARAMETERS = {*_CHOICES, "num_bags"}
_COUNT = re.compile(r"[0-9]{1,9}")
_NOT_UNESCAPED = re.compile(rb"%(?:2F|[01][0-9A-F]|7F)", re.IGNORECASE)
# A number that is written as JSON takes as long as so many that are decoded and copied.
WRITTEN_VALUE = 8
_READ_ID = 32  # and as many, to read an id of JSON
_PATH = re.compile(r"/v1/tables/([^/]+)/lookup", re.DOTALL)
_MOST_KEPT, _LONGEST_KEPT = 256, 512  # plans, and characters of what one is made from


class Asked(NamedTuple):
    """What a request asks for, apart from its ids; `num_bags` is how many of octets' bags there are."""

    table: str
    dtype: VectorType = "float32"
    missing: MissingPolicy = "zeros"
    pooling: Pooling = "none"
    num_bags: int | None = None


class Plan(NamedTuple):
    """How a body is answered.

    Attributes:
        answer: from a body to its reply.
        values_per_id: what an id takes, in values of binary vectors that take as long.
        is_json: whether the body is; else it is bytes.
    """

    answer: Callable[[bytes], Reply]
    values_per_id: int
    is_json: bool

    def num_values(self, body: bytes) -> int:
        """What the reply to a body takes at most, in values of binary vectors."""
        if self.is_json:
            return values_of_json(body, self.values_per_id)
        return len(body) // ID_BYTES * self.values_per_id


class LookupPlans:
    """The plans of one engine's tables, which never change."""

    def __init__(self, engine: Engine, json_lookups: JsonLookups) -> None:
        self._engine = engine
        self._json_lookups = json_lookups
        self._plan = functools.lru_cache(_MOST_KEPT)(self._make_plan)
        self._asked = functools.lru_cache(_MOST_KEPT)(asked_of)

    def asked_of(self, path: str, query: bytes) -> Asked | None:
        """What `asked_of` makes of a path and a query."""
        return self._asked(path, query) if len(path) + len(query) <= _LONGEST_KEPT else None

    def plan(self, asked: Asked, content_type: str | None, accept: str) -> Plan:
        """How to read and answer a body.

        Args:
            asked: for what.
            content_type: the header, if there is one.
            accept: the header; "" is */*.

        Raises:
            UnknownTableError: no such table.
            UnsupportedMediaTypeError: a body type that is not read.
            NotAcceptableError: a reply type that is not offered.
        """
        num_characters = len(asked.table) + len(content_type or "") + len(accept)
        return (self._plan if num_characters <= _LONGEST_KEPT else self._make_plan)(asked, content_type, accept)

    def _make_plan(self, asked: Asked, content_type: str | None, accept: str) -> Plan:
        engine, (name, dtype, missing, pooling, _) = self._engine, asked
        table, version = engine.table(name), engine.store.version
        given = body_type(content_type)
        are_strings = table.vocabulary.kind == "string"
        if given == OCTETS and are_strings:
            raise UnsupportedMediaTypeError(f"Content-Type: table {name!r} has string ids; send them as {JSON}")
        wanted = _reply_type(accept, table, pooling)
        _check_bags(asked, given)
        if wanted == CODES and dtype != "float32":
            raise InvalidRequestError(f"dtype: got {dtype} with codes, which have none; cast what they decode to")
        read = _reader(asked, given)
        dim = table.manifest.embedding_dim
        if wanted == JSON and (pooling != "none" or not self._json_lookups.has_texts(name)):
            dim *= WRITTEN_VALUE
        row_bytes = table.manifest.layout.row_bytes if wanted == CODES else 0
        has_tiers = wanted == CODES and len(table.tiers) > 1

        def request_of(body: bytes) -> TableRequest:
            ids, bag_lengths_B = read(body)
            return TableRequest(name, ids, dtype, missing, pooling, bag_lengths_B)

        def from_octets_to_octets(body: bytes) -> Reply:  # what is asked for in haste
            check_octets(body)
            reply, num_missing = engine.lookup_octets(name, body, "codes" if wanted == CODES else dtype, missing)
            num_ids = len(body) // ID_BYTES
            if wanted == CODES:
                return Reply(reply, codes_headers(version, num_ids, row_bytes, num_missing, has_tiers=has_tiers))
            return Reply(reply, octets_headers(version, num_ids, table.manifest.embedding_dim, dtype, num_missing))

        def to_octets(body: bytes) -> Reply:
            return lookup_to_octets(version, engine.lookup([request_of(body)]).lookups[0])

        def to_json(body: bytes) -> Reply:
            text = self._json_lookups.of_one(request_of(body))
            return Reply(text, Headers(JSON, len(text), {}))

        def to_codes(body: bytes) -> Reply:
            return codes_to_octets(version, engine.lookup_codes(name, read(body)[0], missing))

        if wanted == ARROW:
            pa = load_pyarrow()

        def to_arrow(body: bytes) -> Reply:
            request = request_of(body)
            found = engine.lookup([request]).lookups[0]
            return lookup_to_arrow(pa, (name, version), request.ids, found, are_strings=are_strings)

        if wanted in (OCTETS, CODES) and given == OCTETS and pooling == "none":
            return Plan(from_octets_to_octets, dim, is_json=False)
        answer = {JSON: to_json, OCTETS: to_octets, CODES: to_codes, ARROW: to_arrow}[wanted]
        return Plan(answer, dim, is_json=given == JSON)


def values_of_json(body: bytes, values_per_id: int) -> int:
    """As `Plan.num_values`, of JSON: its ids may be of a digit each, and its commas tell how many there are at most."""
    return (body.count(b",") + 1) * (values_per_id + _READ_ID) + len(body)


def _reply_type(accept: str, table: Table, pooling: Pooling) -> str:
    """As `reply_type`, of the forms that there are of a table.

    Raises:
        NotAcceptableError: none is accepted; it says why a form is not offered that is offered elsewhere.
    """
    whys = {}
    if not table.manifest.has_codes:
        whys[CODES] = f"table {table.name!r} is of kind {table.manifest.kind!r} and has no codes"
    if pooling != "none":
        whys |= dict.fromkeys((CODES, ARROW), "bags have no ids and no codes: pooling gives vectors alone")
    try:
        return reply_type(accept, tuple(form for form in FORMS if form not in whys))
    except NotAcceptableError as error:
        why = "".join(f"; {why}" for form, why in whys.items() if form in accept.lower())
        raise NotAcceptableError(f"{error}{why}") from None


def _check_bags(asked: Asked, given: str) -> None:
    needs_number = asked.pooling != "none" and given == OCTETS
    if needs_number and asked.num_bags is None:
        raise InvalidRequestError("num_bags: got none; with pooling, say in the query how many lengths follow the ids")
    if not needs_number and asked.num_bags is not None:
        raise InvalidRequestError(f"num_bags: got {asked.num_bags}, want it with pooling of {OCTETS} alone")


def _reader(asked: Asked, given: str) -> Callable[[bytes], tuple[Ids, NDArray[np.int64] | None]]:
    """From a body to ids and bag lengths."""
    if asked.pooling == "none":
        ids_of = ids_from_octets if given == OCTETS else ids_from_json
        return lambda body: (ids_of(body), None)
    num_bags = asked.num_bags
    return bags_from_json if num_bags is None else lambda body: bags_from_octets(body, num_bags)


def asked_of(path: str, query: bytes) -> Asked | None:
    """What a path and a query ask for; None where that is for the general way to say: another route, a wrong value."""
    found = _PATH.fullmatch(path)
    if found is None:
        return None
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    given = dict(pairs)
    if len(given) < len(pairs) or not given.keys() <= _PARAMETERS:
        return None
    chosen = [given.get(name, default) for name, (default, _) in _CHOICES.items()]
    if any(value not in choices for value, (_, choices) in zip(chosen, _CHOICES.values(), strict=True)):
        return None
    num_bags = given.get("num_bags")
    if num_bags is not None and not _COUNT.fullmatch(num_bags):
        return None
    return Asked(found[1], *chosen, None if num_bags is None else int(num_bags))  # type: ignore[arg-type, call-arg]


def check_encoding(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """See that a body is sent as it is.

    Raises:
        UnsupportedMediaTypeError: it is compressed, or encoded otherwise.
    """
    for name, value in headers:
        if name == b"content-encoding":
            for encoding in value.decode("latin-1").split(","):
                if encoding.strip().lower() not in ("", "identity"):
                    got = encoding.strip()
                    raise UnsupportedMediaTypeError(f"Content-Encoding: got {got!r}, want identity: the body as it is")


def path_of(scope: Scope) -> str:
    """The path by which a route is found, without what is escaped in it.

    A slash or a control character that is escaped stays so: it is no part of any route, and must not become one.
    """
    path: str = scope["path"]
    raw: bytes = scope.get("raw_path") or b""
    return raw.decode("latin-1") if b"%" in raw and _NOT_UNESCAPED.search(raw) else path


def types_of(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str | None, str]:
    """Content-Type, the first if there are several, and Accept, all together."""
    content_type, accept = None, ""
    for name, value in headers:
        if name == b"accept":
            accept = f"{accept},{value.decode('latin-1')}" if accept else value.decode("latin-1")
        elif name == b"content-type" and content_type is None:
            content_type = value.decode("latin-1")
    return content_type, accept
