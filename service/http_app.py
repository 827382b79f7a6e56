"""The HTTP API (contract 4). In: an Engine. Out: an ASGI application. Handlers parse, call the engine and render."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, TypeVar

import orjson
import swagger_ui_bundle
from fastapi import Depends, FastAPI, Query, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from dpq_rec import ConfigError
from dpq_rec.table import MissingPolicy, VectorType
from dpq_rec.wire import ID_BYTES
from service import http_schema
from service.auth import check_key
from service.engine import INLINE_VALUES, Engine
from service.errors import InvalidRequestError, TooManyBytesError
from service.http_bodies import (
    BINARY,
    JSON,
    lookups_to_json,
    search_from_json,
    search_to_json,
    tables_from_json,
    to_json,
)
from service.http_errors import HELD, observe
from service.http_lookup import (
    HOW_TO_SEND_A_KEY,
    ROUTE,
    WRITTEN_VALUE,
    LookupHandler,
    LookupQuery,
    body_type,
    check_encoding,
    reply_type,
    values_of_json,
)
from service.messages import SearchRequest, TableRequest

T = TypeVar("T")
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHOWN = 64  # characters of a parameter's name

IdsAs = Annotated[
    Literal["number", "string"],
    # /docs is JavaScript: its form begins with the value that it shows unchanged.
    Query(description=http_schema.IDS_AS, openapi_examples={"exact in JavaScript": {"value": "string"}}),
]


def create_app(engine: Engine) -> FastAPI:
    """The application. Its paths are relative to where it is mounted, so that a proxy may put a prefix before them."""
    app = FastAPI(
        title="dpq-rec embedding server",
        version="1",
        description="Ids to embedding vectors, from tables compressed with differentiable product quantization.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.openapi_version = http_schema.OPENAPI_VERSION
    observe(app, engine.metrics)
    _add_routes(app, HttpApi(engine))
    app.add_route("/docs", http_schema.docs, include_in_schema=False)
    for route in app.routes:
        if isinstance(route, Route) and not isinstance(route, APIRoute):  # /docs and /openapi.json
            route.app = _with_query_check(route.app)
    app.mount(f"/{http_schema.ASSETS}", StaticFiles(directory=swagger_ui_bundle.swagger_ui_path))
    return app


def _add_routes(app: FastAPI, api: HttpApi) -> None:
    key = api.engine.settings.api_key
    guards = [*([Depends(_key_check(key))] if key else []), Depends(check_query)]
    on_key = http_schema.errors(401) if key else {}
    refusals = {**http_schema.errors(400, 404, 406, 413, 415, 422, 429, 500, 503), **on_key}

    def get(path: str, handler: Callable[..., Any], **texts: Any) -> None:
        app.add_api_route(path, handler, **{"dependencies": guards, "responses": on_key, **texts})

    def post(path: str, handler: Callable[..., Any], responses: Any = refusals, **texts: Any) -> None:
        app.add_api_route(path, handler, methods=["POST"], dependencies=guards, responses=responses, **texts)

    unguarded: Any = {"response_model": http_schema.Health, "dependencies": [Depends(check_query)]}
    get("/livez", api.livez, summary="Whether this worker lives", responses=None, **unguarded)
    get("/readyz", api.readyz, summary="Whether to send requests here", responses=http_schema.errors(503), **unguarded)
    get(
        "/metrics",
        api.metrics,
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **on_key},
    )
    get("/v1/tables", api.tables, summary="The tables that are served", response_model=http_schema.TablesReply)
    post(
        ROUTE,
        api.lookup,
        summary="Vectors of ids",
        response_model=http_schema.LookupReply,
        responses={200: http_schema.LOOKUP_REPLY, **refusals},
        openapi_extra=http_schema.LOOKUP_BODY,
    )
    get(
        "/v1/tables/{table}/values",
        api.values,
        summary="What decodes a table's codes",
        response_class=Response,
        responses={200: http_schema.VALUES_REPLY, **http_schema.errors(404, 422), **on_key},
    )
    post(
        "/v1/tables/{table}/search",
        api.search,
        summary="Ids whose vectors are most similar to queries",
        response_model=http_schema.SearchReply,
        openapi_extra=http_schema.SEARCH_BODY,
    )
    post(
        "/v1/lookup",
        api.lookup_tables,
        summary="Vectors of ids of several tables, from one version",
        response_model=http_schema.MultiLookupReply,
        openapi_extra=http_schema.MULTI_LOOKUP_BODY,
    )


# What is checked of every request


def _key_check(api_key: str) -> Callable[..., Awaitable[None]]:
    async def check(
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))],
        header: Annotated[str | None, Security(APIKeyHeader(name="X-API-Key", auto_error=False))],
    ) -> None:
        # What FastAPI finds is only for its documentation.
        check_key(request.scope["headers"], api_key.encode(), HOW_TO_SEND_A_KEY)

    return check


async def check_query(request: Request) -> None:
    """A mistyped parameter would otherwise do nothing, and of two of one name one would.

    Raises:
        InvalidRequestError: the query has a parameter that the route does not, or one twice.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    if not names:
        return
    dependant = getattr(request.scope.get("route"), "dependant", None)
    known: list[str] = []
    for parameter in [] if dependant is None else dependant.query_params:  # a model is one of them
        known += getattr(parameter.field_info.annotation, "model_fields", [parameter.alias])
    for name in names:
        if name not in known:
            wanted = f"some of {', '.join(known)}" if known else "none here"
            raise InvalidRequestError(f"query: got the parameter {name[:_SHOWN]!r}, want {wanted}")
        if names.count(name) > 1:
            raise InvalidRequestError(f"{name}: got it {names.count(name)} times in the query, want it once")


def _with_query_check(app: ASGIApp) -> ASGIApp:
    """A route of Starlette's, which takes no parameters."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        await check_query(Request(scope))
        await app(scope, receive, send)

    return checked


# The handlers


class HttpApi:
    """The handlers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def livez(self) -> Response:
        """The process answers."""
        return _json({"status": "alive", "version": self.engine.version})

    async def readyz(self) -> Response:
        """The process answers lookups, and is not about to stop."""
        self.engine.check_ready()
        return _json({"status": "ready", "version": self.engine.version})

    async def metrics(self) -> Response:
        """Counters of all workers, in the text format of Prometheus."""
        return Response(self.engine.metrics.render(), media_type=_METRICS_TYPE)

    async def tables(self) -> Response:
        """Name, width, size and vocabulary of each table, and the version."""
        return _json({"version": self.engine.version, "tables": self.engine.list_tables()})

    async def lookup(self, request: Request, table: str, query: Annotated[LookupQuery, Query()]) -> Response:
        """Vectors in the order of the ids, or of bags of them.

        An id that the vocabulary does not hold gives zeros and its position in `missing`, or an error with
        `missing=error`. Ids and vectors travel as JSON or, in a fraction of the time, as application/octet-stream;
        vectors also as an Arrow IPC stream, or as the codes that the values of `/v1/tables/{table}/values` decode.

        With `pooling`, `bag_lengths` says how many ids, in order, each bag has, and each bag has a vector: added in the
        order of the ids in 32 bits. Missing ids add nothing and do not count in a mean; an empty bag is zeros.
        """
        handler = LookupHandler(self.engine, table, query, request.headers)
        body = await self._receive(request)
        reply = await self._run(request, lambda: handler.answer(body), handler.num_values(body))
        return reply.response()

    async def values(self, request: Request, table: str) -> Response:
        """What decodes a table's codes: a safetensors file, the same as long as the version is.

        The tensor `values` (F32 or F16) is [M, K, S], or [L, K, S] where the subspaces share them: M = L x D codes of a
        row, K choices of each, S numbers of each choice. Its metadata says `version`, `num_subspaces` (D), `num_codes`
        (K), `code_bits` and `num_levels` (L): a JSON list, with an entry for each tier of rows.
        """
        version, found = self.engine.version, self.engine.table(table)

        def answer() -> Response:
            try:
                return Response(found.values(version).to_bytes(), headers={"X-Version": version}, media_type=BINARY)
            except ConfigError as error:
                raise InvalidRequestError(str(error)) from error

        request.scope[HELD].enter_context(self.engine.slot())
        return await self._run(request, answer, found.artifact_bytes // ID_BYTES * self.engine.max_dim)

    async def search(
        self, request: Request, table: str, missing: MissingPolicy = "zeros", ids: IdsAs = "number"
    ) -> Response:
        """The ids whose vectors are most similar to queries, exactly: every row of the table is scored.

        Queries are vectors, or ids of the table, whose vectors they are then. The best come first; of equal scores the
        lower row, which is the more frequent id where rows are sorted by frequency. An id may be among the answers to
        itself. An unknown id has none, and its position in `missing`, or is an error with `missing=error`.

        Integer ids of more than 53 bits are rounded by readers of JSON that have no integers, such as JavaScript: ask
        for them as strings with `ids=string`.
        """
        _check_is_json(request)
        self.engine.table(table)
        body = await self._receive(request)

        def answer(check: Callable[[], None]) -> Response:
            found = self.engine.search(SearchRequest(table=table, missing=missing, **search_from_json(body)), check)
            return Response(search_to_json(table, self.engine.version, found, ids), media_type=JSON)

        return await _unless_left(request, self.engine.run_search(answer))

    async def lookup_tables(
        self, request: Request, dtype: VectorType = "float32", missing: MissingPolicy = "zeros"
    ) -> Response:
        """Vectors of several tables in one request: all from one version, with one limit on their ids together."""
        _check_is_json(request)
        body = await self._receive(request)

        def answer() -> Response:
            requests = [TableRequest(t, ids, dtype, missing) for t, ids in tables_from_json(body).items()]
            lookups = zip(requests, lookups_to_json(self.engine, requests), strict=True)
            entries = b",".join(b"%b:%b" % (to_json(each.table), text) for each, text in lookups)
            text = b'{"version":%b,"tables":{%b}}' % (to_json(self.engine.version), entries)
            return Response(text, media_type=JSON)

        return await self._run(request, answer, values_of_json(body, self.engine.max_dim * WRITTEN_VALUE))

    async def _receive(self, request: Request) -> bytes:
        """The body, read no further than the limit whatever its length is said to be; a slot is held from then on.

        Raises:
            UnsupportedMediaTypeError: it is encoded.
            TooManyBytesError: it is longer.
            OverloadedError: too many bytes of bodies are arriving, or requests are in flight.
            MalformedError: it comes in chunks that are none, or does not arrive in time.
            ClientDisconnect: the client left.
        """
        admission = request.scope[HELD].enter_context(self.engine.admission())
        check_encoding(request.headers)
        limit_bytes = self.engine.settings.body_limit_bytes
        body, is_whole = bytearray(), False
        is_long = int(request.headers.get("content-length", 0)) > limit_bytes
        while not is_whole and not is_long:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            is_whole = not message.get("more_body", False)
            piece: bytes = message.get("body", b"")
            is_long = len(body) + len(piece) > limit_bytes
            if not is_whole and not is_long:
                admission.receive(len(piece))
            body += piece
        if is_long:
            text = f"body: got more than {limit_bytes} bytes; send several, or raise --max-body-bytes"
            raise TooManyBytesError(text)
        admission.take_slot()
        return bytes(body)

    async def _run(self, request: Request, work: Callable[[], T], num_values: int) -> T:
        """As `Engine.run_values`, unless the client leaves before it is done."""
        if num_values <= INLINE_VALUES:
            return work()
        return await _unless_left(request, self.engine.run_values(work, num_values))


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """The result of work; it is cancelled where the client leaves first.

    Raises:
        ClientDisconnect: it did.
    """

    async def wait_until_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(wait_until_left())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type=JSON)


def _check_is_json(request: Request) -> None:
    """Other bodies and replies are not known here."""
    body_type(request.headers, (JSON,))
    reply_type(request.headers, (JSON,))
