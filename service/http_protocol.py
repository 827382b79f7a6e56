"""A connection: a fast path for small lookups, ASGI for all else. In: what a socket receives. Out: replies.

A lookup whose head and small body have arrived whole is answered then and there: no task, no scope, no messages. All
else goes through ASGI, one request at a time: what has arrived behind it waits, and beyond a little nothing more is
read. Whatever a client may keep waiting, or make the server keep, has a limit, in time (`http_connection.Phase`) and in
bytes: 64 KiB of a head (431), what the settings say of a body (413, by who reads it).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from service.engine import Engine, State
from service.errors import MalformedError
from service.http_bodies import Reply, error_reply
from service.http_connection import SECONDS, Connection, Phase
from service.http_exchange import Exchange
from service.http_lookup import LOOKUP, fast_answer
from service.http_parser import HEAD_END, Body, ChunkedBody, Head, HeadError, IncomingHead, parse_head

LAST_SECONDS = 0.5  # that an idle connection stays open when the server ends: a request may be on its way
_LONGEST_KEPT, _MOST_KEPT = 4096, 1024  # bytes of a head, and heads: a client sends much the same again and again
_MOST_WAITING = 1 << 16  # bytes that are read ahead
_MOST_THROWN_AWAY = 1 << 20
_STATUS_LINES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n".encode() for each in http.HTTPStatus}


class Request(NamedTuple):
    """A request whose head has arrived; `answer` gives the reply to its body, where the fast path may."""

    head: Head
    answer: Callable[[bytes], Reply | None] | None


def http_protocol(engine: Engine) -> Callable[..., HttpProtocol]:
    """What makes the connections of an engine's server; uvicorn calls it as it calls a class of protocols."""

    def read(head: bytes) -> Request:
        parsed = parse_head(head)
        return Request(parsed, fast_answer(engine, parsed))

    return functools.partial(HttpProtocol, engine, read, functools.lru_cache(_MOST_KEPT)(read))


class HttpProtocol(Connection):
    """See the module.

    Args:
        engine: what answers.
        read: a head.
        read_short: likewise, one that may be kept.
        config, server_state, app_state: uvicorn's.
    """

    def __init__(
        self,
        engine: Engine,
        read: Callable[[bytes], Request],
        read_short: Callable[[bytes], Request],
        *,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config.timeout_keep_alive, server_state)
        self._engine, self._read, self._read_short = engine, read, read_short
        self._app = cast(ASGIApp, config.loaded_app)
        self._buffer = bytearray()
        self._heads = IncomingHead()
        self._small: Request | None = None  # whose body has not arrived, and is to be answered on the fast path
        self.exchange: Exchange | None = None  # the last one by ASGI
        self._body: Body | None = None  # what has not arrived of its request
        self._num_received = 0  # bytes of it
        self._has_left = self._is_ending = False
        self._held = contextlib.ExitStack()  # the slot or admission of what is answered past ASGI, while it waits

    # The transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; or refuse to, where there are too many."""
        self.transport = cast(asyncio.Transport, transport)
        connections = self.server_state.connections
        connections.add(cast(Any, self))
        # Writing is paused as long as anything is unsent: a request counts until the socket has taken its reply.
        self.transport.set_write_buffer_limits(high=0)
        self._enter(Phase.IDLE)
        limit = self._engine.settings.max_connections
        if len(connections) > 2 * limit:
            self.transport.abort()
        elif len(connections) > limit and not self._make_room():
            text = f"{limit} connections are open, as many as --max-connections allows; try again later"
            self._refuse(HeadError(503, text))

    def data_received(self, data: bytes) -> None:
        """Answer what has arrived, or keep it until it can be answered."""
        if self.phase is Phase.IDLE and self._answers_whole(data):
            return
        if self._is_closing:
            self._num_received += len(data)
            if self._num_received > _MOST_THROWN_AWAY:
                self.transport.abort()
            return
        self._buffer += data
        self._advance()

    def eof_received(self) -> bool:
        """Note that the client sends no more; whether the connection stays open for a reply."""
        self._has_left = True
        if self.phase in (Phase.IDLE, Phase.BODY, Phase.CLOSING):
            return False
        if self.exchange is not None:
            self.exchange.has_left = True
            self.exchange.news.set()
        if self.phase is Phase.HEAD:
            self._advance()
        return True

    def resume_writing(self) -> None:
        """Note that it has taken all, and go on."""
        self.is_write_paused = False
        self._is_sent.set()
        self._held.close()
        self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self.server_state.connections.discard(cast(Any, self))
        if self._small is not None:
            self._begin(self._small.head)  # which counts that its client has left
        self._held.close()
        self._buffer.clear()
        self._is_closing, self.is_write_paused = True, False
        self._is_sent.set()
        if self.exchange is not None:
            self.exchange.is_cut_off |= not self.exchange.is_complete
            self.exchange.news.set()
        if exc is None:
            self.transport.close()

    # What arrives

    def _answers_whole(self, data: bytes) -> bool:
        """Answer what is one lookup and no more, as it mostly is; whether it was."""
        at = data.find(HEAD_END, 0, _LONGEST_KEPT)
        if at < 0:
            return False
        try:
            head, answer = self._read_short(data[:at])
        except HeadError:
            return False
        at += len(HEAD_END)
        return answer is not None and len(data) - at == head.num_bytes and self._answers(answer, data[at:])

    def _answers(self, answer: Callable[[bytes], Reply | None], body: bytes) -> bool:
        """Answer a lookup that has arrived on the fast path; whether there is room and time for it.

        It takes no slot: nothing else happens before it would be left again.
        """
        if not self._engine.has_room:
            return False
        started = time.perf_counter()
        reply = answer(body)
        if reply is None:
            return False
        self._engine.metrics.answered("http", LOOKUP, str(reply.status), time.perf_counter() - started)
        self._deadline = self.loop.time() + self._seconds[Phase.IDLE]
        self.write(reply.status, reply.head, reply.body)
        self.server_state.total_requests += 1
        if self.is_write_paused:
            self._held.enter_context(self._engine.slot())
        return True

    def _advance(self) -> None:
        """Take in what has arrived, as far as it goes: one request at a time."""
        while self._buffer and not self._is_closing and not self.transport.is_closing():
            if self._body is not None:
                self._take_body(self._body)
                break
            if self._small is not None:
                self._take_small(*self._small)
                break
            if self.phase not in (Phase.IDLE, Phase.HEAD) or not self._take_head():
                break
        self.throttle()

    def _take_head(self) -> bool:
        """Begin with the request in the buffer; whether there was one, and more may be taken of it."""
        try:
            found = self._heads.take(self._buffer)
            if found is None:
                self._wait_for_head()
                return False
            head, answer = request = (self._read_short if len(found) <= _LONGEST_KEPT else self._read)(found)
        except HeadError as error:
            self._refuse(error)
            return False
        if answer is None or not self._engine.has_room or cast(int, head.num_bytes) > _MOST_WAITING:
            self._begin(head)
            return True
        self._small = request
        self._held.enter_context(self._engine.admission())
        self._take_small(head, answer)
        return False

    def _take_small(self, head: Head, answer: Callable[[bytes], Reply | None] | None) -> None:
        """Answer a lookup with a small body, once it has arrived."""
        num_bytes = cast(int, head.num_bytes)
        if num_bytes > len(self._buffer):
            if self.phase is not Phase.BODY:
                self._enter(Phase.BODY)
            return
        self._small = None
        self._held.close()
        if answer is None or not self._answers(answer, bytes(self._buffer[:num_bytes])):
            self._begin(head)
            return
        del self._buffer[:num_bytes]
        if not self.is_write_paused:
            self._go_on()

    def _wait_for_head(self) -> None:
        if self._has_left:
            self.transport.close()
        if self.phase is not self._phase_now():
            self._enter(self._phase_now())

    def _begin(self, head: Head) -> None:
        """Answer a request through ASGI."""
        self._small = None
        self._held.close()
        self.exchange = exchange = Exchange(self, head)
        if not exchange.is_whole:
            self._body = ChunkedBody() if head.num_bytes is None else Body(head.num_bytes)
        if (head.num_bytes or 0) > self._engine.settings.body_limit_bytes:
            exchange.keeps_alive = False  # what is left of the body is not worth reading
        self._num_received = 0
        self._enter(self._phase_now())
        if self._buffer and self._body is not None:
            self.loop.call_soon(self._advance)
        task = self.loop.create_task(exchange.run(self._app))
        self.server_state.tasks.add(task)
        task.add_done_callback(self.server_state.tasks.discard)

    def _take_body(self, body: Body) -> None:
        """Hand on what is in the buffer of a body."""
        exchange = cast(Exchange, self.exchange)
        try:
            piece = body.take(self._buffer)
        except MalformedError as error:
            self._fail(exchange, error)
            return
        self._num_received += len(piece)
        if not exchange.is_complete:
            exchange.body += piece
            exchange.is_whole = body.is_whole
            exchange.news.set()
        elif self._num_received > self._engine.settings.body_limit_bytes:
            self._close(gently=True)
        if body.is_whole:
            self._body = None
            self._go_on()
        elif piece and self._buffer:
            self.loop.call_soon(self._advance)

    def _fail(self, exchange: Exchange, error: MalformedError) -> None:
        """End a request whose body cannot be read any more: with the reply, if there is none yet."""
        if exchange.is_complete:
            self._close(gently=True)
        else:
            exchange.error = error
            exchange.news.set()
            self._buffer.clear()
            self._is_closing, self._num_received = True, 0
            self._enter(Phase.ANSWER)

    def throttle(self) -> None:
        """Read no further ahead than a little."""
        if self.transport.is_closing():
            return
        exchange = self.exchange
        num_waiting = 0 if exchange is None or exchange.is_complete else len(exchange.body)
        self._pause_reading(max(num_waiting, len(self._buffer)) > _MOST_WAITING)

    # Replies

    def write(self, status: int, head: bytes, body: bytes | memoryview) -> None:
        """Begin a reply, its head being the lines of its own headers and the empty one."""
        self.transport.writelines([_first_lines(status, *self.server_state.default_headers) + head, body])

    def stays_open(self) -> bool:
        """Whether the connection is of use after the reply that begins now."""
        exchange = cast(Exchange, self.exchange)
        if exchange.error is not None or (exchange.waits and self._body is not None):
            return False
        is_last = self._is_ending or self._engine.state in (State.DRAINING, State.STOPPING)
        return not is_last or bool(self._buffer)

    def replied(self, *, keeps_alive: bool) -> None:
        """Go on behind a reply that has been written."""
        self.server_state.total_requests += 1
        if keeps_alive:
            self._go_on()
        else:
            self._close(gently=self._body is not None or bool(self._buffer))

    def _refuse(self, error: HeadError) -> None:
        """Answer what is no request, and close."""
        reply = error_reply(error.status, error.error_type, str(error), {"Connection": "close"})
        self.write(reply.status, reply.head, reply.body)
        self._engine.metrics.answered("http", "unmatched", str(error.status), 0.0)
        self._close(gently=True)

    def _close(self, *, gently: bool) -> None:
        """Close behind what has been written; gently, where more has arrived, or will: it would destroy the reply."""
        self._is_closing, self._num_received = True, 0
        self._buffer.clear()
        if gently and not self._has_left and self.transport.can_write_eof():
            self.transport.write_eof()
            self._pause_reading(False)
        else:
            self.transport.close()
        if not self.is_write_paused:
            self._enter(Phase.CLOSING)

    def _go_on(self) -> None:
        """Take up what the connection's state now asks for."""
        self._enter(self._phase_now())
        if self.phase is Phase.HEAD:
            self.loop.call_soon(self._advance)
        elif self.phase in (Phase.IDLE, Phase.BODY) and self._has_left:
            self.transport.close()
        elif not self._is_closing:
            self.throttle()
        if self.phase is Phase.IDLE and self._is_ending:
            self.loop.call_later(LAST_SECONDS, self._end_if_idle)

    # Time

    def _phase_now(self) -> Phase:
        if self.is_write_paused:
            return Phase.WRITE
        if self._is_closing:
            return Phase.CLOSING
        if self._body is not None or self._small is not None:
            return Phase.BODY
        if self.exchange is not None and not self.exchange.is_complete:
            return Phase.ANSWER
        return Phase.HEAD if self._buffer else Phase.IDLE

    def check(self, now: float) -> None:
        """End what has taken too long; to be called again and again."""
        if now < self._deadline or (self.transport.is_closing() and self.phase is not Phase.WRITE):
            return
        if self.phase is Phase.WRITE and self._was_taken():
            self._enter(Phase.WRITE)
        elif self.phase is Phase.IDLE:
            self.transport.close()
        elif self.phase is Phase.HEAD:
            self._refuse(HeadError(408, f"head: it was not complete after {SECONDS[Phase.HEAD]:.0f} s"))
        elif self.phase is Phase.BODY:
            if self._small is not None:
                self._begin(self._small.head)
            self._fail(
                cast(Exchange, self.exchange),
                MalformedError(f"body: it was not complete after {SECONDS[Phase.BODY]:.0f} s"),
            )
        else:
            self.transport.abort()

    # The server's end

    def shutdown(self) -> None:
        """Close when nothing is under way any more, nor was for a moment."""
        self._is_ending = True
        if self.phase is Phase.IDLE:
            self.loop.call_later(LAST_SECONDS, self._end_if_idle)

    def _end_if_idle(self) -> None:
        if self.phase is Phase.IDLE:
            self.transport.close()


@functools.lru_cache(64)
def _first_lines(status: int, *headers: tuple[bytes, bytes]) -> bytes:
    """What every reply begins with: the status, and the headers that uvicorn gives all of them: the date."""
    return _STATUS_LINES[status] + b"".join(b"%b: %b\r\n" % pair for pair in headers)
