"""A client of the embedding server that asks for codes and decodes them. In: ids. Out: Lookup, as in process.

Codes are a sixteenth of the bytes of fp32 vectors (16 bytes a row instead of 256), and the vectors are the server's bit
for bit.

>>> with CodesClient("http://localhost:8080") as client:
...     vectors, missing = client.lookup("item_id", [42, 7])
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import socket
import ssl
from collections.abc import Sequence
from typing import Any, get_args
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError, ServerError
from dpq_rec.http_reply import Reply, read_reply
from dpq_rec.ids import ids_of_any_kind
from dpq_rec.table import Lookup, MissingPolicy
from dpq_rec.wire import BINARY, CODES, JSON, PackedRows, Values

_HEAD_END = b"\r\n\r\n"
_POLICIES = get_args(MissingPolicy)
_MOST_TRIES = 3  # for codes and values of one version, should a server be replaced by the next between the two


_Idle = collections.deque[socket.socket]  # connections that no lookup uses


class CodesClient:
    """Lookups over connections that are kept open, and made anew where they broke.

    Safe to share between threads: each lookup under way has a connection of its own. So has each process: one that was
    forked, or that got the client pickled, makes its own.

    Args:
        url: of the server: http://HOST:PORT, with a path where a proxy put one before its own.
        api_key: where the server asks for one.
        timeout_seconds: of each wait for the server.

    Raises:
        ConfigError: another kind of URL, or a key that no header can hold.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_seconds: float = 30.0) -> None:
        self._url = urlsplit(url)
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ConfigError(f"url: got {url!r}, want http://HOST:PORT or https://HOST:PORT")
        try:
            self._port = self._url.port or (443 if self._url.scheme == "https" else 80)
        except ValueError as error:
            raise ConfigError(f"url: got {url!r}: {error}") from error
        if api_key and not api_key.isprintable():
            raise ConfigError("api_key: got line breaks or other characters that no header can hold, want a key")
        self._key = f"X-API-Key: {api_key}\r\n" if api_key else ""
        self._timeout_seconds = timeout_seconds
        self._values: dict[str, Values] = {}
        self._heads: dict[tuple[str, MissingPolicy, str], bytes] = {}
        self._connections: tuple[int, _Idle] = (
            os.getpid(),
            collections.deque(),
        )  # a process; its unused ones

    def __getstate__(self) -> dict[str, Any]:
        """Without connections and values, which another process gets for itself."""
        return {**vars(self), "_values": {}, "_connections": (0, collections.deque())}

    def lookup(self, table: str, ids: Any, *, missing: MissingPolicy = "zeros") -> Lookup:
        """Vectors of ids (float32), as `EmbeddingStore.lookup` gives them.

        Args:
            table: the table's name; a compressed one.
            ids: [N], integers or strings, as `EmbeddingStore.lookup` takes them.
            missing: "zeros" gives zero vectors to unknown ids and reports their positions; "error" raises.

        Raises:
            IdTypeError: neither strings nor a flat list of 64-bit integers.
            ServerError: what the server refuses, as it says; `error_type` tells it apart. Or something else than codes.
            OSError: the server cannot be reached, or does not answer in time.
            DamagedArtifactError: codes that the values do not know.
            ConfigError: another policy than those named.
        """
        if missing not in _POLICIES:
            raise ConfigError(f"missing: got {missing!r}, want zeros or error")
        held = ids_of_any_kind(ids)
        for _ in range(_MOST_TRIES):
            version, rows = self._codes(table, held, missing)
            values = self._values.get(table)
            if values is None or values.version != version:
                head = self._head("GET", f"{quote(table, safe='')}/values")
                values = self._values[table] = Values.from_bytes(self._ask(head, b"").body)
            if values.version == version:
                return Lookup(values.decode(rows), rows.missing)
        raise ServerError(0, "versions", "codes and values were of different versions, again and again; ask later")

    def _codes(
        self, table: str, ids: NDArray[np.int64] | Sequence[str], missing: MissingPolicy
    ) -> tuple[str, PackedRows]:
        content_type, body = _body_of(ids)
        key = (table, missing, content_type)
        if key not in self._heads:
            more = f"Accept: {CODES}\r\nContent-Type: {content_type}\r\nContent-Length: "
            self._heads[key] = self._head("POST", f"{quote(table, safe='')}/lookup?missing={missing}", more)
        answer = self._ask(self._heads[key] + b"%d" % len(body), body)
        try:
            version = answer.headers[b"x-version"].decode("latin-1")
            sizes = [int(answer.headers[name]) for name in (b"x-num-rows", b"x-row-bytes", b"x-num-missing")]
            rows = PackedRows.from_bytes(answer.body, *sizes)
        except (KeyError, ValueError) as error:
            raise ServerError(200, "reply", f"got no codes, but {answer.body[:80]!r}: {error!r}") from error
        if len(rows.packed_NW) != len(ids):
            raise ServerError(200, "reply", f"got codes of {len(rows.packed_NW)} ids, want {len(ids)}")
        return version, rows

    # The connection

    def _head(self, method: str, path: str, more: str = "") -> bytes:
        """A request's head, without the end of its last line."""
        line = f"{method} {self._url.path.rstrip('/')}/v1/tables/{path} HTTP/1.1\r\n"
        host = f"Host: {self._url.netloc.rpartition('@')[2]}\r\n"
        return f"{line}{host}Accept-Encoding: identity\r\n{self._key}{more}".removesuffix("\r\n").encode()

    def _ask(self, head: bytes, body: bytes) -> Reply:
        request = head + _HEAD_END + body
        reply = self._reply_of_idle(request) or self._reply(request, self._connect())
        if reply.status != 200:
            raise _refusal(reply)
        return reply

    def _idle(self) -> _Idle:
        """The connections of this process that no lookup uses; a forked child begins with none."""
        pid, idle = self._connections
        if pid != os.getpid():
            _close_all(idle)  # the child's copies: the parent's stay open
            idle = collections.deque()
            self._connections = os.getpid(), idle
        return idle

    def _reply_of_idle(self, request: bytes) -> Reply | None:
        """A reply over a connection that was kept; None where there is none, or the server has closed it."""
        try:
            connection = self._idle().pop()
        except IndexError:  # another thread may have taken the last
            return None
        try:
            return self._reply(request, connection)
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            self.close()  # the others will be no better
            return None

    def _reply(self, request: bytes, connection: socket.socket) -> Reply:
        idle = self._idle()  # which `close` replaces
        try:
            try:  # noqa: SIM105 - a context manager takes a microsecond
                connection.sendall(request)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a server that refuses may close before it has read the body: its reply says why
            reply = read_reply(connection)
        except BaseException:  # what is still to come on this connection would be taken for the next reply
            connection.close()
            raise
        if reply.keeps_open and idle is self._connections[1]:
            idle.append(connection)
        else:
            connection.close()
        return reply

    def _connect(self) -> socket.socket:
        host = self._url.hostname or ""
        made = socket.create_connection((host, self._port), self._timeout_seconds)
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._url.scheme == "https":
                return ssl.create_default_context().wrap_socket(made, server_hostname=host)
        except BaseException:
            made.close()
            raise
        return made

    def close(self) -> None:
        """Close the connections; those that other threads use, when their lookups are done."""
        idle, self._connections = self._idle(), (os.getpid(), collections.deque())
        _close_all(idle)

    def __enter__(self) -> CodesClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_all(idle: _Idle) -> None:
    """Close all, though other threads may take some meanwhile."""
    with contextlib.suppress(IndexError):
        while True:
            idle.pop().close()


def _body_of(ids: NDArray[np.int64] | Sequence[str]) -> tuple[str, bytes]:
    """A body's media type, and the body: strings, and no ids at all, travel as JSON."""
    if isinstance(ids, np.ndarray):
        return BINARY, ids.astype("<i8", copy=False).tobytes()
    return JSON, json.dumps({"ids": list(map(str, ids))}).encode()


def _refusal(answer: Reply) -> ServerError:
    try:
        said = json.loads(answer.body)
        return ServerError(answer.status, said["error_type"], said["error"])
    except (ValueError, KeyError, TypeError):
        return ServerError(answer.status, "reply", repr(answer.body[:200]))
