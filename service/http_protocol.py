"""A connection: uvicorn's protocol with limits, and a way past its ASGI. In: what a socket receives. Out: replies.

A request whose head and small body have arrived whole, which is what a lookup looks like, is answered then and there:
no task, no scope, no messages. All else goes through ASGI, one request at a time: what has arrived behind it waits, and
beyond a little nothing more is read. Whatever a client may keep waiting, or make the server keep, has a limit:

    IDLE      nothing has arrived       the connection is closed after `timeout_keep_alive`
    HEAD      a part of a head          408 after 5 s; 431 beyond 64 KiB
    BODY      a part of a body          400 after 30 s; 413 beyond the settings' limit, by who reads it
    ANSWER    a request is answered
    WRITE     a reply waits for room    cut off when the client took less than 64 KiB of it in 10 s
    CLOSING   the last reply is sent    what still arrives is thrown away, so that the reply is not; closed after 2 s
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import fcntl
import math
import struct
import termios
from typing import Any, cast

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.admission import State
from service.errors import MalformedError
from service.http_body import Body, ChunkedBody
from service.http_errors import error_reply
from service.http_exchange import Exchange
from service.http_head import HEAD_END, LONGEST_KEPT, MAX_HEAD_BYTES, Head, HeadError, Heads, find_fault

LAST_SECONDS = 0.5  # that an idle connection stays open when the server ends: a request may be on its way
_LEAST_TAKEN = 1 << 16  # bytes of a reply, for its client to be worth waiting for
_MOST_THROWN_AWAY = 1 << 20
_IDLE_SECONDS = 1.0  # after which a connection is closed to make room for another


class Phase(enum.Enum):
    """Where a connection stands: see the module."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    WRITE = "write"
    CLOSING = "closing"


_SECONDS = {Phase.HEAD: 5.0, Phase.BODY: 30.0, Phase.ANSWER: math.inf, Phase.WRITE: 10.0, Phase.CLOSING: 2.0}


class LookupProtocol(HttpToolsProtocol):
    """See the module.

    Args:
        heads: of the API that answers.
        uvicorns: what uvicorn gives a protocol.
    """

    cycle: Exchange | None  # type: ignore[assignment]

    def __init__(self, heads: Heads, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._heads, self._engine = heads, heads.api.engine
        self._seconds = {Phase.IDLE: self.timeout_keep_alive, **_SECONDS}
        self._buffer = bytearray()
        self._num_seen = 0  # bytes of the buffer's head that are known to hold no end of it
        self._partial: Any = None  # what reads a head before it has arrived whole
        self._body: Body | None = None  # what has not arrived of the request that is answered
        self._num_received = 0  # bytes of it
        self._num_unsent = 0
        self._has_left = self._is_closing = self._is_ending = False
        self._held: contextlib.ExitStack | None = None  # the slot of a reply past ASGI that waits for room
        self.phase, self._deadline = Phase.IDLE, math.inf

    # The transport's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; or refuse to, where there are too many."""
        super().connection_made(transport)
        # Writing is paused as long as anything is unsent: a request counts until the socket has taken its reply.
        transport.set_write_buffer_limits(high=0)
        self._enter(Phase.IDLE)
        limit = self._engine.settings.max_connections
        if len(self.connections) > 2 * limit:
            transport.abort()
        elif len(self.connections) > limit and not self._make_room():
            text = f"{limit} connections are open, as many as --max-connections allows; try again later"
            self._refuse(HeadError(503, text))

    def data_received(self, data: bytes) -> None:
        """Answer what has arrived, or keep it until it can be answered."""
        if self.phase is Phase.IDLE and self._answers(data):
            return
        if self._is_closing:
            self._num_received += len(data)
            if self._num_received > _MOST_THROWN_AWAY:
                self.transport.abort()
            return
        self._buffer += data
        self._advance()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Note that the client sends no more; whether the connection stays open for a reply."""
        self._has_left = True
        if self.phase in (Phase.IDLE, Phase.BODY, Phase.CLOSING):
            return False
        if self.cycle is not None:
            self.cycle.has_left = True
            self.cycle.message_event.set()
        if self.phase is Phase.HEAD:
            self._advance()
        return True

    def pause_writing(self) -> None:
        """Note that the socket takes no more for now."""
        super().pause_writing()
        self._num_unsent = self._count_unsent()
        self._enter(Phase.WRITE)

    def resume_writing(self) -> None:
        """Note that it has taken all, and go on."""
        super().resume_writing()
        self._release()
        self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self._release()
        self._buffer.clear()
        self._is_closing = True
        super().connection_lost(exc)

    # What arrives

    def _answers(self, data: bytes) -> bool:
        """Whether data is one whole request, and was answered past ASGI."""
        at = data.find(HEAD_END, 0, LONGEST_KEPT)
        if at < 0:
            return False
        try:
            head = self._heads.read(data[:at])
        except HeadError:
            return False
        at += len(HEAD_END)
        return len(data) - at == head.num_bytes and self._answers_at_once(head, data[at:])

    def _answers_at_once(self, head: Head, body: bytes) -> bool:
        if head.plan is None:
            return False
        reply = self._heads.api.reply_at_once(head.plan, body)
        if reply is None:
            return False
        lines = self._heads.status(self.server_state.default_headers) + reply.headers.lines
        self._deadline = self.loop.time() + self.timeout_keep_alive
        self.transport.writelines([lines, reply.body])
        self.server_state.total_requests += 1
        if self.flow.write_paused:
            self._held = contextlib.ExitStack()
            self._held.enter_context(self._engine.slot())
        return True

    def _advance(self) -> None:
        """Take in what has arrived, as far as it goes: one request at a time."""
        while self._buffer and not self._is_closing:
            if self._body is not None:
                goes_on = self._take_body(self._body)
            else:
                is_free = self.phase in (Phase.IDLE, Phase.HEAD) and not self.transport.is_closing()
                goes_on = is_free and self._take_head()
            if not goes_on:
                break
        self.throttle()

    def _take_head(self) -> bool:
        """Begin with the request in the buffer; whether there was one, and more may be taken."""
        buffer = self._buffer
        while buffer[:2] == b"\r\n":
            del buffer[:2]
            self._num_seen, self._partial = 0, None
        at = buffer.find(HEAD_END, max(0, self._num_seen - len(HEAD_END) + 1))
        try:
            if at > MAX_HEAD_BYTES or (at < 0 and len(buffer) > MAX_HEAD_BYTES):
                raise HeadError(431, f"head: got more than {MAX_HEAD_BYTES} bytes")
            if at < 0:
                return self._wait_for_head()
            head = self._heads.read(bytes(buffer[:at]))
        except HeadError as error:
            self._refuse(error)
            return False
        del buffer[: at + len(HEAD_END)]
        self._num_seen, self._partial = 0, None
        return self._begin(head)

    def _wait_for_head(self) -> bool:
        if self._partial is None:
            self._partial = httptools.HttpRequestParser(None)
        find_fault(self._partial, bytes(self._buffer[self._num_seen :]))
        self._num_seen = len(self._buffer)
        if self._has_left:
            self.transport.close()
        if self.phase is not self._phase_now():
            self._enter(self._phase_now())
        return False

    def _begin(self, head: Head) -> bool:
        """Answer a request whose head has been taken; whether more may be taken of it."""
        if head.num_bytes is not None and head.num_bytes <= len(self._buffer):
            body = bytes(self._buffer[: head.num_bytes]) if head.plan else b""
            if self._answers_at_once(head, body):
                del self._buffer[: head.num_bytes]
                if not self.flow.write_paused:
                    self._go_on()
                return False
        self.cycle = exchange = Exchange(self, head)
        if head.num_bytes == 0:
            exchange.more_body = False
            exchange.message_event.set()
        else:
            self._body = ChunkedBody() if head.num_bytes is None else Body(head.num_bytes)
        if (head.num_bytes or 0) > self._engine.settings.body_limit_bytes:
            exchange.keep_alive = False  # what is left of the body is not worth reading
        self._num_received = 0
        self._enter(self._phase_now())
        self._start_asgi_task(exchange, self.app)
        return True

    def _take_body(self, body: Body) -> bool:
        """Hand on what is in the buffer of a body; whether it was all of it."""
        exchange = self.cycle
        assert exchange is not None
        try:
            piece = body.take(self._buffer)
        except MalformedError as error:
            self._fail(exchange, error)
            return False
        self._num_received += len(piece)
        if not exchange.response_complete:
            exchange.body += piece
            exchange.more_body = not body.is_whole
            exchange.message_event.set()
        elif self._num_received > self._engine.settings.body_limit_bytes:
            self._close(gently=True)
        if body.is_whole:
            self._body = None
            self._go_on()
        elif piece and self._buffer:
            self.loop.call_soon(self._advance)
        return False

    def _fail(self, exchange: Exchange, error: MalformedError) -> None:
        """End a request whose body cannot be read any more: with the reply, if there is none yet."""
        if exchange.response_complete:
            self._close(gently=True)
        else:
            exchange.error = error
            exchange.message_event.set()
            self._buffer.clear()
            self._is_closing, self._num_received = True, 0
            self._enter(Phase.ANSWER)

    def throttle(self) -> None:
        """Read no further ahead than a little."""
        if self.transport.is_closing():
            return
        num_waiting = 0 if self.cycle is None or self.cycle.response_complete else len(self.cycle.body)
        if max(num_waiting, len(self._buffer)) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        else:
            self.flow.resume_reading()

    # Replies

    def stays_open(self) -> bool:
        """Whether the connection is of use after the reply that begins now."""
        exchange = self.cycle
        assert exchange is not None
        if exchange.error is not None or (exchange.waiting_for_100_continue and self._body is not None):
            return False
        is_last = self._is_ending or self._engine.state in (State.DRAINING, State.STOPPING)
        return not is_last or bool(self._buffer)

    def replied(self, exchange: Exchange) -> None:
        """Go on behind a reply that has been written."""
        self.server_state.total_requests += 1
        if exchange.keep_alive:
            self._go_on()
        else:
            self._close(gently=self._body is not None or bool(self._buffer))

    def _refuse(self, error: HeadError) -> None:
        """Answer what is no request, and close."""
        reply = error_reply(error.status, error.error_type, str(error), {"Connection": "close"})
        headers = [*self.server_state.default_headers, *reply.raw_headers]
        lines = STATUS_LINE[error.status] + b"".join(b"%b: %b\r\n" % pair for pair in headers) + b"\r\n"
        self.transport.writelines([lines, bytes(reply.body)])
        self._engine.metrics.answered("http", "unmatched", str(error.status), 0.0)
        self._close(gently=True)

    def _close(self, *, gently: bool) -> None:
        """Close behind what has been written; gently, where more has arrived, or will: it would destroy the reply."""
        self._is_closing, self._num_received = True, 0
        self._buffer.clear()
        if gently and not self._has_left and self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
        else:
            self.transport.close()
        if not self.flow.write_paused:
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
        if self.flow.write_paused:
            return Phase.WRITE
        if self._is_closing:
            return Phase.CLOSING
        if self._body is not None:
            return Phase.BODY
        if self.cycle is not None and not self.cycle.response_complete:
            return Phase.ANSWER
        return Phase.HEAD if self._buffer else Phase.IDLE

    def _enter(self, phase: Phase) -> None:
        self.phase, self._deadline = phase, self.loop.time() + self._seconds[phase]

    def _since(self) -> float:
        return self._deadline - self._seconds[self.phase]

    def check(self, now: float) -> None:
        """End what has taken too long; to be called again and again."""
        if now < self._deadline or (self.transport.is_closing() and self.phase is not Phase.WRITE):
            return
        if self.phase is Phase.WRITE and self._num_unsent - self._count_unsent() >= _LEAST_TAKEN:
            self._num_unsent = self._count_unsent()
            self._enter(Phase.WRITE)
        elif self.phase is Phase.IDLE:
            self.transport.close()
        elif self.phase is Phase.HEAD:
            self._refuse(HeadError(408, f"head: it was not complete after {_SECONDS[Phase.HEAD]:.0f} s"))
        elif self.phase is Phase.BODY and self.cycle is not None:
            self._fail(self.cycle, MalformedError(f"body: it was not complete after {_SECONDS[Phase.BODY]:.0f} s"))
        else:
            self.transport.abort()

    def _count_unsent(self) -> int:
        """Bytes that the client has not taken: those of the transport, and those of the kernel (Linux only)."""
        with contextlib.suppress(OSError, AttributeError):
            number = self.transport.get_extra_info("socket").fileno()
            (queued,) = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4)))
            return self.transport.get_write_buffer_size() + int(queued)
        return self.transport.get_write_buffer_size()

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def _make_room(self) -> bool:
        """Close the connection that has waited for a request for longest; whether there was one."""
        others = cast("set[LookupProtocol]", self.connections) - {self}
        waiting = [other for other in others if other.phase in (Phase.IDLE, Phase.HEAD, Phase.CLOSING)]
        oldest = min(waiting, key=lambda other: other._since(), default=None)
        if oldest is None or oldest._since() > self.loop.time() - _IDLE_SECONDS:
            return False
        oldest._is_closing = True
        oldest.transport.close()
        return True

    # The server's end

    def shutdown(self) -> None:
        """Close when nothing is under way any more, nor was for a moment."""
        self._is_ending = True
        if self.phase is Phase.IDLE:
            self.loop.call_later(LAST_SECONDS, self._end_if_idle)

    def _end_if_idle(self) -> None:
        if self.phase is Phase.IDLE:
            self.transport.close()
