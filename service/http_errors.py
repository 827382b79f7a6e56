"""Errors of the HTTP API. In: exceptions. Out: `{"error", "error_type"}` with a status; every request is counted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Mapping
from typing import TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpq_rec import DamagedArtifactError
from service import errors
from service.engine import Engine
from service.http_format import JSON

T = TypeVar("T")
logger = logging.getLogger("service.http")

_HEADERS: dict[type[Exception], dict[str, str]] = {
    errors.UnauthorizedError: {"WWW-Authenticate": "Bearer"},
    errors.OverloadedError: {"Retry-After": "1"},
    errors.NotReadyError: {"Retry-After": "1"},
    # What is left of the body is not worth reading.
    errors.TooManyBytesError: {"Connection": "close"},
}
HELD = "dpq_rec.held"
_MOST_TEXT = 2000  # characters of an error: what it repeats of a request may be megabytes
CLIENT_LEFT = "499"  # the status that is counted, and never sent, where the client did not wait for one


def error_reply(status: int, error_type: str, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """`{"error", "error_type"}`; what is too long of the text is left out."""
    text = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"
    body = orjson.dumps({"error": text, "error_type": error_type})
    return Response(body, status, headers=dict(headers or {}), media_type=JSON)


def add_error_handlers(app: FastAPI) -> None:
    """Answer in one form whatever is raised on purpose, and what the framework raises."""
    for kind in errors.ERROR_CODES:
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_parameters)
    app.add_exception_handler(HTTPException, _refuse_route)


async def _refuse(request: Request, error: Exception) -> Response:
    return _refusal(error)


def _refusal(error: Exception) -> Response:
    codes = errors.ERROR_CODES[type(error)]
    return error_reply(codes.http, codes.error_type, str(error), _HEADERS.get(type(error)))


async def _refuse_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    text = f"{first['loc'][1]}: got {first.get('input')!r}: {first['msg']}"
    return error_reply(422, errors.ERROR_CODES[errors.InvalidRequestError].error_type, text)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    error_type = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
    text = f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is"
    return error_reply(error.status_code, error_type, text, error.headers)


def refusal(error: Exception, method: str) -> Response:
    """The reply to whatever was raised: 500, and a line in the log, for what nobody expected. Call it in `except`."""
    return _refusal(error) if type(error) in errors.ERROR_CODES else _internal(error, method)


def _internal(error: Exception, method: str) -> Response:
    logger.exception("%s failed", method)
    is_damage = isinstance(error, DamagedArtifactError)  # which no caller is to blame for
    return error_reply(500, "internal", str(error) if is_damage else "internal error; the server's log says more")


def note_client_left(method: str) -> None:
    """Nobody waits for a reply."""
    logger.debug("%s: the client left before its body was complete", method)


async def unless_left(receive: Receive, work: Awaitable[T]) -> T:
    """The result of work; it is cancelled where the client leaves first.

    Raises:
        ClientDisconnect: it did.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _left(receive: Receive) -> None:
    """Wait until the client has left; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Observed:
    """ASGI middleware: counts every request, and turns what nobody expected into a 500 and a line in the log.

    HEAD is answered, and counted, as GET is, without the body. What a handler puts on the stack scope[HELD] is held
    until its reply has been sent.
    """

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self.app = app
        self.metrics = engine.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, code, is_head = time.perf_counter(), CLIENT_LEFT, scope["method"] == "HEAD"
        if is_head:
            scope = {**scope, "method": "GET"}

        async def note_status(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            with contextlib.ExitStack() as held:
                scope[HELD] = held
                await self.app(scope, receive, note_status)
        except ClientDisconnect:
            note_client_left(_route(scope))
        except Exception as error:
            reply = _internal(error, _route(scope))
            if code != CLIENT_LEFT:
                raise
            await reply(scope, receive, note_status)
        finally:
            self.metrics.answered("http", _route(scope), code, time.perf_counter() - started)


def _route(scope: Scope) -> str:
    """The route's template, never what the caller wrote: a metric's labels must stay few."""
    route, method = scope.get("route"), scope["method"]
    methods = getattr(route, "methods", None) or ("GET", "HEAD")
    return f"{method} {getattr(route, 'path', '')}" if route is not None and method in methods else "unmatched"
