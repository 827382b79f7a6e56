"""uvicorn's protocol, and a way past its ASGI. In: what a socket receives. Out: a reply, or uvicorn's own way.

A request whose head and small body have arrived whole, which is what a lookup looks like, is answered then and there:
no task, no scope, no messages. A client sends much the same head again and again, so that what one asks for is
kept. All else (a body in pieces, a large one, another route, whatever is to be refused) is uvicorn's, untouched.
"""

from __future__ import annotations

import functools
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.http_api import HttpApi
from service.http_format import Reply

_HEAD_END = b"\r\n\r\n"
_OK = b"HTTP/1.1 200 OK\r\n"
_MOST_KEPT, _LONGEST_HEAD = 1024, 4096  # heads, and bytes of one


class Head(NamedTuple):
    """How the body that follows a head is answered, and its length."""

    plan: Callable[[bytes], Reply]
    num_bytes: int


class Heads:
    """Heads of requests, and what they ask an API for."""

    def __init__(self, api: HttpApi) -> None:
        self.api = api
        self.read = functools.lru_cache(_MOST_KEPT)(self._read)
        self._default_headers: list[tuple[bytes, bytes]] | None = None
        self._status = _OK

    def status(self, default_headers: list[tuple[bytes, bytes]]) -> bytes:
        """The status line, and the headers that uvicorn gives every reply: the date, a new list each second."""
        if default_headers is not self._default_headers:
            self._default_headers = default_headers
            self._status = _OK + b"".join(b"%b: %b\r\n" % pair for pair in default_headers)
        return self._status

    def _read(self, head: bytes) -> Head | None:
        """What a head asks for, without its empty line; None for what is uvicorn's."""
        seen = _Seen()
        parser = seen.parser = httptools.HttpRequestParser(seen)
        try:
            parser.feed_data(head + _HEAD_END)
            url = httptools.parse_url(seen.url)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return None
        if not url.path:
            return None
        names = [name for name, _ in seen.headers]
        plain = parser.get_http_version() == "1.1" and seen.keeps_alive and not parser.should_upgrade()
        if not plain or {b"transfer-encoding", b"expect"} & set(names) or names.count(b"content-length") != 1:
            return None
        num_bytes = int(dict(seen.headers)[b"content-length"])
        scope = {
            "type": "http",
            "method": parser.get_method().decode(),
            "path": urllib.parse.unquote(url.path.decode("ascii")),
            "query_string": url.query or b"",
            "headers": seen.headers,
        }
        asked = self.api.asked_of(scope)
        plan = None if asked is None else self.api.plan_at_once(asked, seen.headers, num_bytes)
        return None if plan is None else Head(plan, num_bytes)


class _Seen:
    """What httptools finds in a head."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.parser: Any = None
        self.keeps_alive = False

    def on_headers_complete(self) -> None:
        self.keeps_alive = self.parser.should_keep_alive()  # behind an empty body the parser has forgotten it

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


class LookupProtocol(HttpToolsProtocol):
    """See the module.

    Args:
        heads: of the API that answers.
        uvicorns: what uvicorn gives a protocol.
    """

    def __init__(self, heads: Heads, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._heads = heads
        self._is_between = True  # two requests, as far as the parser has seen
        self._answered_at = 0.0

    def data_received(self, data: bytes) -> None:
        """Answer what has arrived, or leave it to uvicorn."""
        if not self._answers(data):
            super().data_received(data)

    def _answers(self, data: bytes) -> bool:
        """Whether data is one whole request, and was answered."""
        at = data.find(_HEAD_END, 0, _LONGEST_HEAD)
        is_idle = self._is_between and (self.cycle is None or self.cycle.response_complete)
        if at < 0 or not is_idle or self.flow.write_paused:
            return False
        head = self._heads.read(data[:at])
        at += len(_HEAD_END)
        if head is None or len(data) != at + head.num_bytes:
            return False
        reply = self._heads.api.reply_at_once(head.plan, data[at:])
        if reply is None:
            return False
        self.transport.writelines(
            [self._heads.status(self.server_state.default_headers) + reply.headers.lines, reply.body]
        )
        self._keep_alive()
        return True

    def _keep_alive(self) -> None:
        """As uvicorn does after a reply, with one timer for many."""
        self.server_state.total_requests += 1
        self._answered_at = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wait(self.timeout_keep_alive)

    def _wait(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, unless it was of use since the timer was set."""
        left = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._wait(left)
        else:
            super().timeout_keep_alive_handler()

    def on_message_begin(self) -> None:
        """Note that the parser is inside a request."""
        self._is_between = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """Note that it is not."""
        self._is_between = True
        super().on_message_complete()
