"""The HTTP API (contract 4). In: an Engine. Out: an ASGI application. Handlers parse, call the engine and render."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import orjson
import swagger_ui_bundle
from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.staticfiles import StaticFiles

from dpq_rec.lookup import MissingPolicy, VectorType
from service import http_schema
from service.engine import Engine, SearchRequest, TableRequest
from service.errors import MalformedError, TooManyBytesError, UnauthorizedError, UnsupportedMediaTypeError
from service.http_errors import Observed, add_error_handlers
from service.http_format import (
    JSON,
    OCTETS,
    body_type,
    ids_from_json,
    ids_from_octets,
    lookup_to_json,
    lookup_to_octets,
    reply_type,
    search_from_json,
    search_to_json,
    tables_from_json,
    tables_to_json,
)

_BODY_SECONDS = 30.0
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ASSETS = "docs/assets"


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
    app.add_middleware(Observed, engine=engine)
    add_error_handlers(app)
    api = HttpApi(engine)
    _add_health_routes(app, api)
    _add_lookup_routes(app, api)
    app.add_route("/docs", _docs, include_in_schema=False)
    app.mount(f"/{_ASSETS}", StaticFiles(directory=swagger_ui_bundle.swagger_ui_path))
    return app


def _add_health_routes(app: FastAPI, api: HttpApi) -> None:
    app.add_api_route("/livez", api.livez, summary="Whether this worker lives", response_model=http_schema.Health)
    app.add_api_route(
        "/readyz",
        api.readyz,
        summary="Whether to send requests here",
        response_model=http_schema.Health,
        responses=http_schema.errors(503),
    )
    app.add_api_route(
        "/metrics",
        api.metrics,
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **_with_key(api, http_schema.errors())},
        dependencies=_guards(api),
    )


def _add_lookup_routes(app: FastAPI, api: HttpApi) -> None:
    guards = _guards(api)
    app.add_api_route(
        "/v1/tables",
        api.tables,
        summary="The tables that are served",
        response_model=http_schema.TablesReply,
        responses=_with_key(api, http_schema.errors()),
        dependencies=guards,
    )
    refusals = http_schema.errors(400, 404, 406, 413, 415, 422, 429, 500, 503)
    app.add_api_route(
        "/v1/tables/{table}/lookup",
        api.lookup,
        methods=["POST"],
        summary="Vectors of ids",
        response_model=http_schema.LookupReply,
        responses=_with_key(api, {200: http_schema.OCTET_REPLY, **refusals}),
        openapi_extra=http_schema.LOOKUP_BODY,
        dependencies=guards,
    )
    app.add_api_route(
        "/v1/tables/{table}/search",
        api.search,
        methods=["POST"],
        summary="Ids whose vectors are most similar to queries",
        response_model=http_schema.SearchReply,
        responses=_with_key(api, refusals),
        openapi_extra=http_schema.SEARCH_BODY,
        dependencies=guards,
    )
    app.add_api_route(
        "/v1/lookup",
        api.lookup_tables,
        methods=["POST"],
        summary="Vectors of ids of several tables, from one version",
        response_model=http_schema.MultiLookupReply,
        responses=_with_key(api, refusals),
        openapi_extra=http_schema.MULTI_LOOKUP_BODY,
        dependencies=guards,
    )


def _with_key(api: HttpApi, responses: dict[int | str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    return {**responses, **http_schema.errors(401)} if api.settings.api_key else responses


def _guards(api: HttpApi) -> list[Any]:
    return [Depends(_key_check(api.settings.api_key))] if api.settings.api_key else []


def _key_check(api_key: str) -> Callable[..., Awaitable[None]]:
    wanted = api_key.encode()

    async def check_key(
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))],
        header: Annotated[str | None, Security(APIKeyHeader(name="X-API-Key", auto_error=False))],
    ) -> None:
        given = bearer.credentials if bearer else header
        if given is None:
            raise UnauthorizedError("got no API key; send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")
        if not hmac.compare_digest(given.encode(), wanted):
            raise UnauthorizedError("got an API key that is not this server's")

    return check_key


async def _docs(request: Request) -> Response:
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="dpq-rec embedding server",
        swagger_js_url=f"{_ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{_ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{_ASSETS}/favicon-32x32.png",
    )


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The body, read no further than the limit whatever its length is said to be.

    Raises:
        TooManyBytesError: it is longer.
        MalformedError: it does not arrive in time.
    """
    too_many = TooManyBytesError(f"body: got more than {limit_bytes} bytes; send several, or raise --max-body-bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise too_many
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > limit_bytes:
                    raise too_many
    except TimeoutError:
        raise MalformedError(f"body: it was not complete after {_BODY_SECONDS:.0f} s") from None
    return bytes(body)


class HttpApi:
    """The handlers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.settings = engine.settings

    async def livez(self) -> Response:
        """The process answers."""
        return _json({"status": "alive", "version": self.engine.store.version})

    async def readyz(self) -> Response:
        """The process answers lookups, and is not about to stop."""
        self.engine.check_ready()
        return _json({"status": "ready", "version": self.engine.store.version})

    async def metrics(self) -> Response:
        """Counters of all workers, in the text format of Prometheus."""
        return Response(self.engine.metrics.render(), media_type=_METRICS_TYPE)

    async def tables(self) -> Response:
        """Name, width, size and vocabulary of each table, and the version."""
        return _json(self.engine.list_tables()._asdict())

    async def lookup(
        self, request: Request, table: str, dtype: VectorType = "float32", missing: MissingPolicy = "zeros"
    ) -> Response:
        """Vectors in the order of the ids.

        An id that the vocabulary does not hold gives zeros and its position in `missing`, or an error with
        `missing=error`. Ids and vectors travel as JSON or, in a fraction of the time, as application/octet-stream.
        """
        engine = self.engine
        is_string = engine.table(table).vocabulary.kind == "string"
        given = body_type(request.headers.get("content-type"))
        if given == OCTETS and is_string:
            raise UnsupportedMediaTypeError(f"Content-Type: table {table!r} has string ids; send them as {JSON}")
        wanted = reply_type(_accept(request))
        with engine.slot():
            body = await read_body(request, self.settings.body_limit_bytes)
            ids_of = ids_from_octets if given == OCTETS else ids_from_json

            def answer() -> Response:
                asked = TableRequest(table=table, ids=ids_of(body), dtype=dtype, missing=missing)
                version, (found,) = engine.lookup([asked])
                if wanted == JSON:
                    return Response(lookup_to_json(table, version, found), media_type=JSON)
                octets, headers = lookup_to_octets(version, found)
                return Response(octets, headers=headers, media_type=OCTETS)

            return await engine.run(answer, len(body))

    async def search(self, request: Request, table: str, missing: MissingPolicy = "zeros") -> Response:
        """The ids whose vectors are most similar to queries, exactly: every row of the table is scored.

        Queries are vectors, or ids of the table, whose vectors they are then. The best come first; of equal scores the
        lower row, which is the more frequent id where rows are sorted by frequency. An id may be among the answers to
        itself. An unknown id has none, and its position in `missing`, or is an error with `missing=error`.
        """
        body_type(request.headers.get("content-type"), (JSON,))
        reply_type(_accept(request), (JSON,))
        engine = self.engine
        engine.table(table)
        with engine.slot():
            body = await read_body(request, self.settings.body_limit_bytes)

            def answer() -> Response:
                asked = SearchRequest(table=table, missing=missing, **search_from_json(body))
                return Response(search_to_json(table, engine.search(asked)), media_type=JSON)

            return await engine.run_search(answer)

    async def lookup_tables(
        self, request: Request, dtype: VectorType = "float32", missing: MissingPolicy = "zeros"
    ) -> Response:
        """Vectors of several tables in one request: all from one version, with one limit on their ids together."""
        body_type(request.headers.get("content-type"), (JSON,))
        reply_type(_accept(request), (JSON,))
        engine = self.engine
        with engine.slot():
            body = await read_body(request, self.settings.body_limit_bytes)

            def answer() -> Response:
                tables = tables_from_json(body)
                asked = [TableRequest(table=t, ids=ids, dtype=dtype, missing=missing) for t, ids in tables.items()]
                version, found = engine.lookup(asked)
                return Response(tables_to_json(version, dict(zip(tables, found, strict=True))), media_type=JSON)

            return await engine.run(answer, len(body))


def _accept(request: Request) -> str:
    return ",".join(request.headers.getlist("accept"))


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type=JSON)
