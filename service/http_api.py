"""The HTTP API (contract 4). In: an Engine. Out: an ASGI application. Handlers parse, call the engine and render."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, Any, TypeVar

import orjson
import swagger_ui_bundle
from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from dpq_rec import ConfigError
from dpq_rec.table import MissingPolicy, VectorType
from dpq_rec.wire import ID_BYTES
from service import http_schema
from service.auth import check_key
from service.engine import INLINE_VALUES, Engine
from service.errors import InvalidRequestError, OverloadedError, UnauthorizedError
from service.http_body import read_body
from service.http_errors import CLIENT_LEFT, HELD, Observed, add_error_handlers, note_client_left, refusal, unless_left
from service.http_format import (
    JSON,
    OCTETS,
    Reply,
    body_type,
    reply_type,
    search_from_json,
    search_to_json,
    tables_from_json,
)
from service.http_json import JsonLookups
from service.http_lookup import (
    ROUTE,
    WRITTEN_VALUE,
    Asked,
    LookupPlans,
    check_encoding,
    path_of,
    types_of,
    values_of_json,
)
from service.http_query import IdsAs, NumBags, check_query, with_query_check
from service.messages import Pooling, SearchRequest, TableRequest

T = TypeVar("T")
_HOW_TO_SEND_A_KEY = "send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LOOKUP = f"POST {ROUTE}"


class App(FastAPI):
    """FastAPI, and a shorter way for the lookups of one table, which passes none of its layers.

    What the shorter way does not know for sure (another route, a wrong value, a key that is not the right one) goes on
    to FastAPI, whose route does the same.
    """

    def __init__(self, api: HttpApi, **texts: Any) -> None:
        super().__init__(**texts)
        self.api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        asked = self.api.asked_of(scope)
        if asked is None:
            await super().__call__({**scope, "path": path_of(scope)} if "path" in scope else scope, receive, send)
        else:
            await self._answer(asked, scope, receive, send)

    async def _answer(self, asked: Asked, scope: Scope, receive: Receive, send: Send) -> None:
        """As `Observed` and the error handlers would."""
        started, code = time.perf_counter(), CLIENT_LEFT
        try:
            with contextlib.ExitStack() as held:
                reply = await self.api.reply(asked, scope["headers"], receive, held)
                code = "200"
                await send({"type": "http.response.start", "status": 200, "headers": reply.headers.raw})
                await send({"type": "http.response.body", "body": reply.body})
        except ClientDisconnect:
            note_client_left(_LOOKUP)
        except Exception as error:
            if code == "200":
                raise
            refused = refusal(error, _LOOKUP)
            code = str(refused.status_code)
            await refused(scope, receive, send)
        finally:
            self.api.engine.metrics.answered("http", _LOOKUP, code, time.perf_counter() - started)


def create_app(engine: Engine) -> App:
    """The application. Its paths are relative to where it is mounted, so that a proxy may put a prefix before them."""
    api = HttpApi(engine)
    app = App(
        api,
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
    _add_health_routes(app, api)
    _add_lookup_routes(app, api)
    app.add_route("/docs", http_schema.docs, include_in_schema=False)
    for route in app.routes:
        if isinstance(route, Route) and not isinstance(route, APIRoute):  # /docs and /openapi.json
            route.app = with_query_check(route.app)
    app.mount(f"/{http_schema.ASSETS}", StaticFiles(directory=swagger_ui_bundle.swagger_ui_path))
    return app


def _add_health_routes(app: FastAPI, api: HttpApi) -> None:
    app.add_api_route(
        "/livez",
        api.livez,
        summary="Whether this worker lives",
        response_model=http_schema.Health,
        dependencies=[Depends(check_query)],
    )
    app.add_api_route(
        "/readyz",
        api.readyz,
        summary="Whether to send requests here",
        response_model=http_schema.Health,
        responses=http_schema.errors(503),
        dependencies=[Depends(check_query)],
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
        ROUTE,
        api.lookup,
        methods=["POST"],
        summary="Vectors of ids",
        response_model=http_schema.LookupReply,
        responses=_with_key(api, {200: http_schema.LOOKUP_REPLY, **refusals}),
        openapi_extra=http_schema.LOOKUP_BODY,
        dependencies=guards,
    )
    app.add_api_route(
        "/v1/tables/{table}/values",
        api.values,
        summary="What decodes a table's codes",
        response_class=Response,
        responses=_with_key(api, {200: http_schema.VALUES_REPLY, **http_schema.errors(404, 422)}),
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
    key_checks = [Depends(_key_check(api.settings.api_key))] if api.settings.api_key else []
    return [*key_checks, Depends(check_query)]


def _key_check(api_key: str) -> Callable[..., Awaitable[None]]:
    async def check(
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))],
        header: Annotated[str | None, Security(APIKeyHeader(name="X-API-Key", auto_error=False))],
    ) -> None:
        # What FastAPI finds is only for its documentation.
        check_key(request.scope["headers"], api_key.encode(), _HOW_TO_SEND_A_KEY)

    return check


class HttpApi:
    """The handlers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.settings = engine.settings
        self._json_lookups = JsonLookups(engine)
        self._plans = LookupPlans(engine, self._json_lookups)

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
        self,
        request: Request,
        table: str,
        dtype: VectorType = "float32",
        missing: MissingPolicy = "zeros",
        pooling: Pooling = "none",
        num_bags: NumBags = None,
    ) -> Response:
        """Vectors in the order of the ids, or of bags of them.

        An id that the vocabulary does not hold gives zeros and its position in `missing`, or an error with
        `missing=error`. Ids and vectors travel as JSON or, in a fraction of the time, as application/octet-stream;
        vectors also as an Arrow IPC stream, or as the codes that the values of `/v1/tables/{table}/values` decode.

        With `pooling`, `bag_lengths` says how many ids, in order, each bag has, and each bag has a vector: added in the
        order of the ids in 32 bits. Missing ids add nothing and do not count in a mean; an empty bag is zeros.
        """
        asked = Asked(table, dtype, missing, pooling, num_bags)
        reply = await self.reply(asked, request.scope["headers"], request.receive, request.scope[HELD])
        return Response(bytes(reply.body), headers=reply.headers, media_type=reply.headers.media_type)

    async def values(self, request: Request, table: str) -> Response:
        """What decodes a table's codes: a safetensors file, the same as long as the version is.

        The tensor `values` (F32 or F16) is [M, K, S], or [L, K, S] where the subspaces share them: M = L x D codes of a
        row, K choices of each, S numbers of each choice. Its metadata says `version`, `num_subspaces` (D), `num_codes`
        (K), `code_bits` and `num_levels` (L): a JSON list, with an entry for each tier of rows.
        """
        version, found = self.engine.store.version, self.engine.table(table)

        def answer() -> Response:
            try:
                return Response(found.values(version).to_bytes(), headers={"X-Version": version}, media_type=OCTETS)
            except ConfigError as error:
                raise InvalidRequestError(str(error)) from error

        request.scope[HELD].enter_context(self.engine.slot())
        return await self._run(request.receive, answer, found.artifact_bytes // ID_BYTES * self.engine.max_dim)

    def asked_of(self, scope: Scope) -> Asked | None:
        """What a lookup of one table asks for; None for what FastAPI is to answer."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope.get("root_path"):
            return None
        if self.settings.api_key is not None:
            try:
                check_key(scope["headers"], self.settings.api_key.encode(), _HOW_TO_SEND_A_KEY)
            except UnauthorizedError:
                return None
        return self._plans.asked_of(path_of(scope), scope["query_string"])

    def plan_at_once(self, scope: Scope, num_bytes: int) -> Callable[[bytes], Reply] | None:
        """How to answer a body of so many bytes on the event loop; None where it is to wait, or to be refused."""
        asked = self.asked_of(scope)
        if asked is None or num_bytes > self.settings.body_limit_bytes:
            return None
        try:
            check_encoding(scope["headers"])
            plan = self._plans.plan(asked, *types_of(scope["headers"]))
        except Exception:  # the general way finds the same, and says so
            return None
        if not plan.is_json:
            return plan.answer if num_bytes // ID_BYTES * plan.values_per_id <= INLINE_VALUES else None

        def answer_if_small(body: bytes) -> Reply:
            if plan.num_values(body) > INLINE_VALUES:
                raise OverloadedError("the event loop has no time for so many values")  # a thread has
            return plan.answer(body)

        return answer_if_small

    def reply_at_once(self, plan: Callable[[bytes], Reply], body: bytes) -> Reply | None:
        """The reply to a request that has arrived whole, which is counted; None where it is to wait, or to be refused.

        It takes no slot: nothing else happens before it would be left again.
        """
        engine, started = self.engine, time.perf_counter()
        if not engine.has_room:
            return None
        try:
            reply = plan(body)
        except Exception:  # likewise
            return None
        engine.metrics.answered("http", _LOOKUP, "200", time.perf_counter() - started)
        return reply

    async def reply(
        self, asked: Asked, headers: Iterable[tuple[bytes, bytes]], receive: Receive, held: contextlib.ExitStack
    ) -> Reply:
        """The reply to a lookup of one table; raises what `http_errors` knows. `held` is left when it has been sent."""
        plan = self._plans.plan(asked, *types_of(headers))
        body = await self._receive(headers, receive, held)
        return await self._run(receive, lambda: plan.answer(body), plan.num_values(body))

    async def _run(self, receive: Receive, work: Callable[[], T], num_values: int) -> T:
        """As `Engine.run_values`, unless the client leaves before it is done."""
        if num_values <= INLINE_VALUES:
            return work()
        return await unless_left(receive, self.engine.run_values(work, num_values))

    async def _receive(
        self, headers: Iterable[tuple[bytes, bytes]], receive: Receive, held: contextlib.ExitStack
    ) -> bytes:
        """The body; a slot is held from then on."""
        admission = held.enter_context(self.engine.admission())
        body = await read_body(headers, receive, admission)
        admission.take_slot()
        return body

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
        body_type(request.headers.get("content-type"), (JSON,))
        reply_type(types_of(request.scope["headers"])[1], (JSON,))
        engine = self.engine
        engine.table(table)
        body = await self._receive(request.scope["headers"], request.receive, request.scope[HELD])

        def answer(check: Callable[[], None]) -> Response:
            asked = SearchRequest(table=table, missing=missing, **search_from_json(body))
            return Response(search_to_json(table, engine.search(asked, check), ids), media_type=JSON)

        return await unless_left(request.receive, engine.run_search(answer))

    async def lookup_tables(
        self, request: Request, dtype: VectorType = "float32", missing: MissingPolicy = "zeros"
    ) -> Response:
        """Vectors of several tables in one request: all from one version, with one limit on their ids together."""
        body_type(request.headers.get("content-type"), (JSON,))
        reply_type(types_of(request.scope["headers"])[1], (JSON,))
        body = await self._receive(request.scope["headers"], request.receive, request.scope[HELD])

        def answer() -> Response:
            tables = tables_from_json(body)
            asked = [TableRequest(table=t, ids=ids, dtype=dtype, missing=missing) for t, ids in tables.items()]
            return Response(self._json_lookups.of_several(asked), media_type=JSON)

        return await self._run(request.receive, answer, values_of_json(body, self.engine.max_dim * WRITTEN_VALUE))


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type=JSON)
