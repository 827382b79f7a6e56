"""Errors of the HTTP API's application, and its metrics. In: what a handler raises. Out: a reply, and its count."""

from __future__ import annotations

import contextlib
import logging
import time

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ERROR_CODES, InvalidRequestError
from service.http_bodies import error_reply, refusal
from service.http_lookup import route_path
from service.metrics import Metrics

logger = logging.getLogger("service.http")
HELD = "dpq_rec.held"  # the key of the stack in a scope
_CLIENT_LEFT = "499"  # the status that is counted, and never sent, where the client did not wait for one


def observe(app: FastAPI, metrics: Metrics) -> None:
    """Count an application's requests, and give its errors one form: those raised on purpose, and the framework's."""
    app.add_middleware(Observed, metrics=metrics)
    for kind in ERROR_CODES:
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_parameters)
    app.add_exception_handler(HTTPException, _refuse_route)


async def _refuse(request: Request, error: Exception) -> Response:
    return refusal(error, _route(request.scope)).response()


async def _refuse_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    text = f"{first['loc'][1]}: got {first.get('input')!r}: {first['msg']}"
    return refusal(InvalidRequestError(text), _route(request.scope)).response()


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    error_type = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
    text = f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is"
    return error_reply(error.status_code, error_type, text, error.headers).response()


class Observed:
    """ASGI middleware: counts every request, and turns what nobody expected into a 500 and a line in the log.

    HEAD is answered, and counted, as GET is, without the body. What a handler puts on the stack scope[HELD] is held
    until its reply has been sent.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, code, is_head = time.perf_counter(), _CLIENT_LEFT, scope["method"] == "HEAD"
        scope = {**scope, "path": route_path(scope), "method": "GET" if is_head else scope["method"]}

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
            logger.debug("%s: the client left before its body was complete", _route(scope))
        except Exception as error:
            reply = refusal(error, _route(scope))
            if code != _CLIENT_LEFT:
                raise
            await reply.response()(scope, receive, note_status)
        finally:
            self.metrics.answered("http", _route(scope), code, time.perf_counter() - started)


def _route(scope: Scope) -> str:
    """The route's template, never what the caller wrote: a metric's labels must stay few."""
    route, method = scope.get("route"), scope["method"]
    methods = getattr(route, "methods", None) or ("GET", "HEAD")
    return f"{method} {getattr(route, 'path', '')}" if route is not None and method in methods else "unmatched"
