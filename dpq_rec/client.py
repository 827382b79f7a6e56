"""A client of the embedding server that takes codes and decodes them. In: ids. Out: Lookup, as in process.

Codes are a sixteenth of the bytes of fp32 vectors (16 bytes a row instead of 256), and the vectors are the server's bit
for bit. The connection is a socket of the client's own: Python's http.client takes longer to read the head of a
reply than the server takes to answer.

>>> with CodesClient("http://localhost:8080") as client:
...     vectors, missing = client.lookup("item_id", [42, 7])
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError, ServerError
from dpq_rec.ids import ids_of_any_kind
from dpq_rec.lookup import Lookup, MissingPolicy
from dpq_rec.packed import PackedRows, Values, values_of_bytes

CODES = "application/vnd.dpq-rec.codes"
_HEAD_END = b"\r\n\r\n"
_PIECE_BYTES = 1 << 16
_MOST_TRIES = 3  # for codes and values of one version, should a server be replaced by the next between the two


class Answer(NamedTuple):
    """A reply of the server."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes


class CodesClient:
    """Lookups over one connection, which is made at the first and made anew where it broke. For one thread.

    Args:
        url: of the server: http://HOST:PORT, with a path where a proxy put one before its own.
        api_key: where the server asks for one.
        timeout_seconds: of each wait for the server.

    Raises:
        ConfigError: another kind of URL.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_seconds: float = 30.0) -> None:
        self._url = urlsplit(url)
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ConfigError(f"url: got {url!r}, want http://HOST:PORT or https://HOST:PORT")
        self._key = f"X-API-Key: {api_key}\r\n" if api_key else ""
        self._timeout_seconds = timeout_seconds
        self._socket: socket.socket | None = None
        self._values: dict[str, Values] = {}
        self._heads: dict[tuple[str, MissingPolicy, str], bytes] = {}

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
        """
        held = ids_of_any_kind(ids)
        for _ in range(_MOST_TRIES):
            version, rows = self._codes(table, held, missing)
            values = self._values.get(table)
            if values is None or values.version != version:
                answer = self._ask(self._head("GET", f"{quote(table, safe='')}/values"), b"")
                values = self._values[table] = values_of_bytes(answer.body)
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
            version, rows = answer.headers[b"x-version"].decode("latin-1"), _rows_of(answer)
        except (KeyError, ValueError) as error:
            raise ServerError(200, "reply", f"got no codes, but {answer.body[:80]!r}: {error!r}") from error
        if len(rows.packed_NW) != len(ids):
            raise ServerError(200, "reply", f"got codes of {len(rows.packed_NW)} ids, want {len(ids)}")
        return version, rows

    # The connection

    def _head(self, method: str, path: str, more: str = "") -> bytes:
        """A request's head, but for its last line's end."""
        line = f"{method} {self._url.path.rstrip('/')}/v1/tables/{path} HTTP/1.1\r\n"
        return f"{line}Host: {self._url.netloc.rpartition('@')[2]}\r\n{self._key}{more}".removesuffix("\r\n").encode()

    def _ask(self, head: bytes, body: bytes) -> Answer:
        is_new = self._socket is None
        try:
            answer = self._exchange(head + _HEAD_END + body)
        except ConnectionError:
            if is_new:
                raise
            answer = self._exchange(head + _HEAD_END + body)  # the server had closed a connection that was idle
        if answer.status != 200:
            raise _refusal(answer)
        return answer

    def _exchange(self, request: bytes) -> Answer:
        try:
            return self._answer_to(request, self._socket or self._connect())
        except BaseException:  # what is still to come on this connection would be taken for the next reply
            self.close()
            raise

    def _answer_to(self, request: bytes, connection: socket.socket) -> Answer:
        connection.sendall(request)
        received = bytearray()
        while (at := received.find(_HEAD_END)) < 0:
            received += _some(connection)
        status, *lines = bytes(received[:at]).split(b"\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
        if not headers.get(b"content-length", b"").isdigit():
            raise ServerError(0, "reply", f"got {status!r} without a Content-Length, which this client needs")
        num_bytes = int(headers[b"content-length"])
        while len(received) < at + len(_HEAD_END) + num_bytes:
            received += _some(connection)
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return Answer(int(status.split()[1]), headers, bytes(received[at + len(_HEAD_END) :]))

    def _connect(self) -> socket.socket:
        host, is_tls = self._url.hostname or "", self._url.scheme == "https"
        made = socket.create_connection((host, self._url.port or (443 if is_tls else 80)), self._timeout_seconds)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = ssl.create_default_context().wrap_socket(made, server_hostname=host) if is_tls else made
        return self._socket

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> CodesClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rows_of(answer: Answer) -> PackedRows:
    """Raises KeyError or ValueError where it is another reply."""
    headers, content = answer.headers, answer.body
    num_rows, row_bytes = int(headers[b"x-num-rows"]), int(headers[b"x-row-bytes"])
    num_missing, at = int(headers[b"x-num-missing"]), num_rows * row_bytes
    packed_NW = np.frombuffer(content, np.uint8, at).reshape(num_rows, row_bytes)
    positions = np.frombuffer(content, "<u4", num_missing, at).astype(np.uint32, copy=False)
    rest: NDArray[np.uint8] = np.frombuffer(content, np.uint8, -1, at + 4 * num_missing)
    return PackedRows(packed_NW, positions, rest if len(rest) else None)


def _body_of(ids: NDArray[np.int64] | Sequence[str]) -> tuple[str, bytes]:
    """A body's media type, and the body: strings, and no ids at all, travel as JSON."""
    if isinstance(ids, np.ndarray):
        return "application/octet-stream", ids.astype("<i8", copy=False).tobytes()
    return "application/json", json.dumps({"ids": list(map(str, ids))}).encode()


def _some(connection: socket.socket) -> bytes:
    piece = connection.recv(_PIECE_BYTES)
    if not piece:
        raise ConnectionError("the server closed the connection before its reply was complete")
    return piece


def _refusal(answer: Answer) -> ServerError:
    try:
        said = json.loads(answer.body)
        return ServerError(answer.status, said["error_type"], said["error"])
    except (ValueError, KeyError, TypeError):
        return ServerError(answer.status, "reply", repr(answer.body[:200]))
