"""A connection's time, and what it may keep waiting. In: what a transport says. Out: a phase, and when it is to end."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import fcntl
import math
import struct
import termios
from typing import cast

from uvicorn.server import ServerState

_LEAST_TAKEN = 1 << 16  # bytes of a reply, for its client to be worth waiting for
_IDLE_SECONDS = 1.0  # after which a connection is closed to make room for another


class Phase(enum.Enum):
    """Where a connection stands.

    IDLE      nothing has arrived       the connection is closed after `timeout_keep_alive`
    HEAD      a part of a head          408 after 5 s
    BODY      a part of a body          400 after 30 s
    ANSWER    a request is answered
    WRITE     a reply waits for room    cut off when the client took less than 64 KiB of it in 10 s
    CLOSING   the last reply is sent    what still arrives is thrown away, so that the reply is not; closed after 2 s
    """

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    WRITE = "write"
    CLOSING = "closing"


SECONDS = {Phase.HEAD: 5.0, Phase.BODY: 30.0, Phase.ANSWER: math.inf, Phase.WRITE: 10.0, Phase.CLOSING: 2.0}


class Connection(asyncio.Protocol):
    """Base of `http_protocol.HttpProtocol`, which says what happens in each phase, and when it ends.

    Args:
        idle_seconds: that it stays open while nothing arrives.
        server_state: uvicorn's.
    """

    def __init__(self, idle_seconds: float, server_state: ServerState) -> None:
        self.loop, self.server_state = asyncio.get_running_loop(), server_state
        self.transport = cast(asyncio.Transport, None)
        self._seconds = {Phase.IDLE: idle_seconds, **SECONDS}
        self.phase, self._deadline = Phase.IDLE, math.inf
        self.is_read_paused = self.is_write_paused = self._is_closing = False
        self._num_unsent = 0
        self._is_sent = asyncio.Event()  # all that was written
        self._is_sent.set()

    def _enter(self, phase: Phase) -> None:
        self.phase, self._deadline = phase, self.loop.time() + self._seconds[phase]

    def _since(self) -> float:
        return self._deadline - self._seconds[self.phase]

    def pause_writing(self) -> None:
        """Note that the socket takes no more for now."""
        self.is_write_paused = True
        self._is_sent.clear()
        self._num_unsent = self._count_unsent()
        self._enter(Phase.WRITE)

    async def drain(self) -> None:
        """Wait until the socket has taken all."""
        await self._is_sent.wait()

    def _pause_reading(self, is_paused: bool) -> None:
        if is_paused and not self.is_read_paused:
            self.transport.pause_reading()
        elif self.is_read_paused and not is_paused:
            self.transport.resume_reading()
        self.is_read_paused = is_paused

    def _was_taken(self) -> bool:
        """Whether the client has taken enough of the reply since the last time that it had."""
        num_unsent = self._count_unsent()
        if self._num_unsent - num_unsent < _LEAST_TAKEN:
            return False
        self._num_unsent = num_unsent
        return True

    def _count_unsent(self) -> int:
        """Bytes that the client has not taken: those of the transport, and those of the kernel (Linux only)."""
        with contextlib.suppress(OSError, AttributeError):
            number = self.transport.get_extra_info("socket").fileno()
            (queued,) = struct.unpack("i", fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4)))
            return self.transport.get_write_buffer_size() + int(queued)
        return self.transport.get_write_buffer_size()

    def _make_room(self) -> bool:
        """Close the connection that has waited for a request for longest; whether there was one."""
        others = cast("set[Connection]", self.server_state.connections) - {self}
        waiting = [other for other in others if other.phase in (Phase.IDLE, Phase.HEAD, Phase.CLOSING)]
        oldest = min(waiting, key=lambda other: other._since(), default=None)
        if oldest is None or oldest._since() > self.loop.time() - _IDLE_SECONDS:
            return False
        oldest._is_closing = True
        oldest.transport.close()
        return True
