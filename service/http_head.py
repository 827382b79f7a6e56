"""Heads of HTTP requests. In: the bytes before an empty line. Out: a Head, or a HeadError that says why there is none.

A client sends much the same head again and again, so that what one asks for is kept. httptools checks the syntax; what
it lets pass although two readers could take it for two things is refused here. An offer of an upgrade is ignored
(RFC 9110, 7.8), which httptools cannot do: it takes what follows the head for another protocol. So it is given heads
alone, and bodies are read by `service.http_body`.
"""

from __future__ import annotations

import functools
import re
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple

import httptools

from service.http_api import HttpApi
from service.http_format import Reply

HEAD_END = b"\r\n\r\n"
MAX_HEAD_BYTES = 1 << 16
LONGEST_KEPT = 4096  # bytes of a head
_MOST_KEPT = 1024  # heads
_OTHER_VERSION = re.compile(rb" HTTP/(?!1\.[01])\d\.\d\Z")
_OF_HOSTS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~!$&'()*+,;=%:[]-"
_ONCE = (b"host", b"transfer-encoding", b"expect", b"content-type")
_OK = b"HTTP/1.1 200 OK\r\n"
_ERROR_TYPES = {
    400: "malformed",
    408: "timeout",
    417: "expectation_failed",
    431: "head_too_large",
    501: "not_implemented",
    503: "overloaded",
    505: "unsupported_version",
}


class HeadError(Exception):
    """A request that is refused before anybody knows what it asks for; its connection is closed.

    Args:
        status: of the reply.
        text: what is wrong.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.error_type = status, _ERROR_TYPES[status]


class Head(NamedTuple):
    """What a request is, apart from its body.

    Attributes:
        scope: ASGI's, without what depends on the connection.
        num_bytes: of the body; None if it comes in chunks.
        keeps_alive: whether the client wants to send more requests.
        waits: for a 100 before it sends the body.
        plan: from a body to its reply, if it may be answered on the event loop.
    """

    scope: dict[str, Any]
    num_bytes: int | None
    keeps_alive: bool
    waits: bool
    plan: Callable[[bytes], Reply] | None


class Heads:
    """Heads of requests, and what they ask an API for."""

    def __init__(self, api: HttpApi) -> None:
        self.api = api
        self.keep = functools.lru_cache(_MOST_KEPT)(self.parse)
        self._default_headers: list[tuple[bytes, bytes]] | None = None
        self._status = _OK

    def status(self, default_headers: list[tuple[bytes, bytes]]) -> bytes:
        """The status line, and the headers that uvicorn gives every reply: the date, a new list each second."""
        if default_headers is not self._default_headers:
            self._default_headers = default_headers
            self._status = _OK + b"".join(b"%b: %b\r\n" % pair for pair in default_headers)
        return self._status

    def read(self, head: bytes) -> Head:
        """A head, without its empty line.

        Raises:
            HeadError: it is none.
        """
        return (self.keep if len(head) <= LONGEST_KEPT else self.parse)(head)

    def parse(self, head: bytes) -> Head:
        """As `read`, which keeps the short ones."""
        found = _parse(head)
        headers = found.by_name
        num_bytes = None if b"transfer-encoding" in headers else int(headers.get(b"content-length", b"0"))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": found.version,
            "method": found.method,
            "scheme": "http",
            "root_path": "",
            "path": urllib.parse.unquote(found.path.decode("ascii")),
            "raw_path": found.path,
            "query_string": found.query,
            "headers": found.headers,
        }
        waits = b"expect" in headers and found.version == "1.1"
        plan = None if waits or not found.keeps_alive or num_bytes is None else self.api.plan_at_once(scope, num_bytes)
        return Head(scope, num_bytes, found.keeps_alive, waits, plan)


class _Parsed:
    """What httptools finds in a head."""

    def __init__(self) -> None:
        self.url, self.path, self.query, self.method, self.version = b"", b"", b"", "", ""
        self.headers: list[tuple[bytes, bytes]] = []
        self.by_name: dict[bytes, bytes] = {}
        self.keeps_alive = False
        self.parser = httptools.HttpRequestParser(self)

    def on_headers_complete(self) -> None:
        self.method, self.version = self.parser.get_method().decode("ascii"), self.parser.get_http_version()
        # Behind an empty body the parser has forgotten it. HTTP/1.0 may keep a connection, too, but need not.
        self.keeps_alive = self.version == "1.1" and self.parser.should_keep_alive()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip(b" \t")))


def _parse(head: bytes) -> _Parsed:
    first_line = head[: head.find(b"\r\n")] if b"\r\n" in head else head
    if not first_line.endswith((b" HTTP/1.1", b" HTTP/1.0")) or first_line.count(b" ") != 2 or b"#" in first_line:
        is_other = _OTHER_VERSION.search(first_line)
        raise HeadError(505 if is_other else 400, "first line: want METHOD TARGET HTTP/1.1")
    parsed = _Parsed()
    try:
        parsed.parser.feed_data(head + HEAD_END)
    except httptools.HttpParserUpgrade:
        pass  # it was all that was given
    except httptools.HttpParserError as error:
        raise HeadError(400, f"head: {error}") from None
    del parsed.parser  # they know each other, and would be there until the garbage is collected
    _check_headers(parsed)
    _find_path(parsed)
    return parsed


def _find_path(parsed: _Parsed) -> None:
    try:
        url = httptools.parse_url(parsed.url)
        parsed.path, parsed.query = url.path or b"", url.query or b""
    except httptools.HttpParserError:
        pass  # it has none
    if not parsed.path.startswith(b"/"):
        raise HeadError(400, f"target: got {parsed.url.decode('latin-1')!r}, want a path")


def _check_headers(parsed: _Parsed) -> None:
    headers = parsed.by_name = dict(parsed.headers)
    if len(headers) < len(parsed.headers):
        names = [name for name, _ in parsed.headers]
        for name in _ONCE:
            if names.count(name) > 1:
                raise HeadError(400, f"{name.decode().title()}: got {names.count(name)}, want one")
    host = headers.get(b"host", None if parsed.version == "1.1" else b"")
    if host is None or host.translate(None, _OF_HOSTS):
        got = "none" if host is None else repr(host.decode("latin-1"))
        raise HeadError(400, f"Host: got {got}, want NAME or NAME:PORT")
    if b"transfer-encoding" in headers:
        if parsed.version == "1.0":
            raise HeadError(400, "Transfer-Encoding: HTTP/1.0 has none")
        if (coding := headers[b"transfer-encoding"]).lower() != b"chunked":
            raise HeadError(501, f"Transfer-Encoding: got {coding.decode('latin-1')!r}, want chunked alone")
    if b"expect" in headers and headers[b"expect"].lower() != b"100-continue" and parsed.version == "1.1":
        raise HeadError(417, f"Expect: got {headers[b'expect'].decode('latin-1')!r}, want 100-continue")


def find_fault(parser: Any, piece: bytes) -> None:
    """See that a head that has not arrived whole may become one: what is none need not be waited for.

    Args:
        parser: one for each head: `httptools.HttpRequestParser(None)`.
        piece: what has arrived since the last time.

    Raises:
        HeadError: it cannot.
    """
    try:
        parser.feed_data(piece)
    except httptools.HttpParserError as error:
        status = 400 if parser.get_http_version() in ("0.0", "0.9", "1.0", "1.1") else 505
        raise HeadError(status, f"head: {error}") from None
