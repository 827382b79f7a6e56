"""Lookups of one table over HTTP. In: a path, a query, two headers and a body. Out: a Reply.

What does not depend on the body is settled once and kept as a Plan: the same few are asked for again and again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple, get_args
from urllib.parse import parse_qsl

from dpq_rec import Lookup
from dpq_rec.lookup import MissingPolicy, VectorType
from service.engine import Engine, TableRequest
from service.errors import UnsupportedMediaTypeError
from service.http_format import (
    JSON,
    OCTETS,
    Headers,
    Reply,
    body_type,
    ids_from_json,
    ids_from_octets,
    lookup_to_json,
    lookup_to_octets,
    reply_type,
)

ROUTE = "/v1/tables/{table}/lookup"
_PATH = re.compile(r"/v1/tables/([^/]+)/lookup", re.DOTALL)
_MOST_KEPT, _LONGEST_KEPT = 256, 512  # plans, and characters of what one is made from


class Asked(NamedTuple):
    """What a request asks for, apart from its ids."""

    table: str
    dtype: VectorType = "float32"
    missing: MissingPolicy = "zeros"


Plan = Callable[[bytes], Reply]  # from a body to its reply


class LookupPlans:
    """The plans of one engine's tables, which never change."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
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
        engine, (name, dtype, missing) = self._engine, asked
        version, is_string = engine.store.version, engine.table(name).vocabulary.kind == "string"
        given = body_type(content_type)
        if given == OCTETS and is_string:
            raise UnsupportedMediaTypeError(f"Content-Type: table {name!r} has string ids; send them as {JSON}")

        def from_octets(body: bytes) -> Lookup:
            return engine.lookup_ids(name, ids_from_octets(body), dtype, missing)

        def from_json(body: bytes) -> Lookup:
            request = TableRequest(table=name, ids=ids_from_json(body), dtype=dtype, missing=missing)
            return engine.lookup([request]).lookups[0]

        def in_octets(found: Lookup) -> Reply:
            return Reply(*lookup_to_octets(version, found))

        def in_json(found: Lookup) -> Reply:
            body = lookup_to_json(name, version, found)
            return Reply(body, Headers(JSON, len(body), {}))

        find = from_octets if given == OCTETS else from_json
        render = in_octets if reply_type(accept) == OCTETS else in_json
        return lambda body: render(find(body))


def asked_of(path: str, query: bytes) -> Asked | None:
    """What a path and a query ask for; None where that is for the general way to say: another route, a wrong value."""
    found = _PATH.fullmatch(path)
    if found is None:
        return None
    given = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    dtype, missing = given.get("dtype", "float32"), given.get("missing", "zeros")
    if dtype not in get_args(VectorType) or missing not in get_args(MissingPolicy):
        return None
    return Asked(found[1], dtype, missing)  # type: ignore[arg-type] # they are among the literals
