"""Small lookups are answered past ASGI: with the same bytes, and in the same order, as if they had not been."""

import asyncio
import contextlib
import re
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from service import http_protocol, worker
from service.http_protocol import HttpProtocol
from tests.service.http_requests import BINARY, CODES, ITEMS, JSON, USERS, id_bytes


def request(path=ITEMS, body=b"", given=BINARY, accept=BINARY, method="POST", version="1.1", headers=()):
    lines = [f"{method} {path} HTTP/{version}", "Host: x", f"Content-Type: {given}", f"Accept: {accept}"]
    lines += [f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Transport(asyncio.Transport):
    """Keeps what is written, and whether it was closed."""

    def __init__(self):
        super().__init__()
        self.written, self.is_closed, self.has_ended, self.is_reading = bytearray(), False, False, True

    def write(self, data):
        self.written += data

    def is_closing(self):
        return self.is_closed

    def close(self):
        self.is_closed = True

    def abort(self):
        self.is_closed = True

    def can_write_eof(self):
        return True

    def write_eof(self):
        self.has_ended = True

    def get_write_buffer_size(self):
        return 0

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def pause_reading(self):
        self.is_reading = False

    def resume_reading(self):
        self.is_reading = True


@pytest.fixture
def exchange(make_engine):
    """exchange(pieces, engine=None): what a connection is sent when it sends pieces, and whether it was closed."""

    def run(pieces, engine=None, between=lambda protocol: None, app=None):
        async def scenario():
            config = worker.http_config(engine or make_engine())
            config.app = app or config.app
            config.load()
            protocol = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})
            transport = Transport()
            protocol.connection_made(transport)
            for piece in pieces:
                if not transport.is_closed:
                    protocol.data_received(piece)
                for _ in range(3):
                    await asyncio.sleep(0)
                between(protocol)
            num_quiet = 0  # turns of the loop in which nothing was answered
            while num_quiet < 20:
                num_quiet = 0 if protocol.server_state.tasks else num_quiet + 1
                await asyncio.sleep(0.001 if protocol.server_state.tasks else 0)
            return bytes(transport.written), transport.is_closed or transport.has_ended

        return asyncio.run(scenario())

    return run


@pytest.fixture
def at_once(monkeypatch):
    """A list with an entry, whether it succeeded, for each attempt to answer at once."""
    attempts, answers = [], HttpProtocol._answers

    def noted(self, *request):
        attempts.append(answers(self, *request))
        return attempts[-1]

    monkeypatch.setattr(HttpProtocol, "_answers", noted)
    return attempts


def replies(written):
    """Status, headers and body of each reply, without the order of the headers."""
    found = []
    while written:
        head, _, rest = written.partition(b"\r\n\r\n")
        status, *lines = head.split(b"\r\n")
        headers = {line.partition(b": ")[0]: line.partition(b": ")[2] for line in lines}
        length = int(headers[b"content-length"])
        found.append((status, headers, rest[:length]))
        written = rest[length:]
    return found


KNOWN = id_bytes([39, 0, 99])
WHOLE = {  # answered at once
    "bytes": request(USERS, KNOWN),
    "float16": request(f"{USERS}?dtype=float16&missing=zeros", KNOWN),
    "codes": request(ITEMS, KNOWN, accept=CODES),
    "no ids": request(USERS),
    "JSON": request(USERS, b'{"ids": [1]}', JSON, JSON),
    "JSON to bytes": request(USERS, b'{"ids": [1, 99]}', JSON, BINARY),
    "bags": request(f"{USERS}?pooling=sum&num_bags=1", KNOWN + b"\3\0\0\0"),
    "escaped path": request("/v1/tables/user%5Fid/lookup", KNOWN),
}
REFUSED = {  # likewise
    "unknown id": request(f"{USERS}?missing=error", KNOWN),
    "broken id": request(USERS, b"1234567"),
    "broken JSON": request(USERS, b"{", JSON, JSON),
    "JSON of another form": request(USERS, b'{"id": [1]}', JSON, JSON),
    "unknown table": request("/v1/tables/usr/lookup", KNOWN),
    "another type of body": request(USERS, KNOWN, given="text/plain"),
    "another type of reply": request(USERS, KNOWN, accept="text/plain"),
    "a body that is encoded": request(USERS, KNOWN, headers=["Content-Encoding: gzip"]),
    "num_bags without pooling": request(f"{USERS}?num_bags=1", KNOWN),
    "too many ids": request(USERS, id_bytes([1] * 301)),
}
OTHERS = {  # left to ASGI
    "GET": b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "wrong value": request(f"{USERS}?dtype=x", KNOWN),
    "wrong number": request(f"{USERS}?pooling=sum&num_bags=x", KNOWN),
    "unknown parameter": request(f"{USERS}?type=x", KNOWN),
    "parameter twice": request(f"{USERS}?dtype=float32&dtype=float32", KNOWN),
    "too many bytes": request(USERS, bytes(2**22 + 8)),
    "large": request(USERS, id_bytes(range(50_000))),
    "chunked": request(USERS, b"", headers=["Transfer-Encoding: chunked"]).replace(b"Content-Length: 0\r\n", b"")
    + b"8\r\n"
    + id_bytes([1])
    + b"\r\n0\r\n\r\n",
    "close": request(USERS, KNOWN, headers=["Connection: close"]),
    "close, no ids": request(USERS, headers=["Connection: close"]),
    "no path": request("http://example.com", KNOWN),
    "no port": request(f"http://a:99999{USERS}", KNOWN),
    "HTTP/1.0": request(USERS, KNOWN, version="1.0"),
}


@pytest.mark.parametrize("sent", [*WHOLE.values(), *REFUSED.values()], ids=[*WHOLE, *REFUSED])
def test_what_is_answered_at_once_is_answered_as_fastapi_does(exchange, make_engine, at_once, monkeypatch, sent):
    engines = [make_engine(max_ids=300) for _ in range(3)]
    whole, _ = exchange([sent], engines[0])
    in_pieces, _ = exchange([sent[:30], sent[30:-5], sent[-5:]], engines[1])
    assert at_once == [True, True]
    monkeypatch.setattr(http_protocol, "fast_answer", lambda *request: None)
    by_asgi, _ = exchange([sent], engines[2])
    assert at_once == [True, True]
    assert replies(whole) == replies(in_pieces) == replies(by_asgi)
    assert (replies(whole)[0][0] == b"HTTP/1.1 200 OK") == (sent in WHOLE.values())
    counted = [re.findall(r"dpq_(?:requests|ids)_total.*", e.metrics.render().decode()) for e in engines]
    assert counted[0] == counted[1] == counted[2]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_answered_at_once_is_answered_by_asgi(exchange, at_once, name):
    written, _ = exchange([OTHERS[name]])
    assert True not in at_once
    assert len(replies(written)) == 1


def test_what_nobody_expected_is_a_500_and_logged(exchange, make_engine, monkeypatch, at_once, caplog):
    engine = make_engine()
    monkeypatch.setattr(engine, "lookup_bytes", lambda *found: 1 / 0)
    written, is_closed = exchange([WHOLE["bytes"], OTHERS["GET"]], engine)
    assert [status.split()[1] for status, _, _ in replies(written)] == [b"500", b"200"]
    assert (at_once, is_closed) == ([True], False)
    assert "ZeroDivisionError" in caplog.text
    assert b'code="500"' in engine.metrics.render()


def test_a_lookup_that_fails_behind_the_begin_of_its_reply_is_cut_off(exchange, make_engine):
    """ASGI's: nobody is told that a part of a reply is the whole."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        raise ZeroDivisionError

    written, is_closed = exchange([OTHERS["GET"]], app=app)
    assert (written[-1:], is_closed) == (b"1", True)


def test_an_application_that_fails_is_a_500(exchange):
    async def app(scope, receive, send):
        raise ZeroDivisionError

    written, is_closed = exchange([OTHERS["GET"]], app=app)
    ((status, headers, body),) = replies(written)
    assert (status, headers[b"connection"], is_closed) == (b"HTTP/1.1 500 Internal Server Error", b"close", True)
    assert b'"error_type":"internal"' in body


@pytest.mark.parametrize("name", ["close", "close, no ids", "HTTP/1.0", "too many bytes"])
def test_a_connection_that_is_to_close_is_closed(exchange, name):
    assert exchange([OTHERS[name]])[1]
    assert not exchange([WHOLE["bytes"]])[1]


STREAM = b"".join([*WHOLE.values(), REFUSED["broken id"], OTHERS["GET"], request(USERS, WHOLE["bytes"])])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_replies_do_not_depend_on_how_a_stream_is_cut(exchange, cuts):
    """The last request's body looks like a request: it must not be taken for one, wherever the cuts are."""
    begins = [0, *sorted(cuts)]
    pieces = [STREAM[begin:end] for begin, end in zip(begins, [*begins[1:], None], strict=True)]
    found = replies(exchange([piece for piece in pieces if piece])[0])
    whole = replies(exchange([STREAM])[0])
    assert [(status, body) for status, _, body in found] == [(status, body) for status, _, body in whole]
    assert len(found) == len(WHOLE) + 3


@pytest.mark.parametrize("path", [USERS, "/v1/tables/usr/lookup"])
def test_a_body_that_looks_like_a_request_is_not_taken_for_one(exchange, at_once, path):
    inner, fill = WHOLE["bytes"], b" " * (-len(WHOLE["bytes"]) % 8)
    outer = request(path, inner + fill)
    written, _ = exchange([outer[: outer.index(inner)], inner, fill])
    assert at_once == [True]
    assert len(replies(written)) == 1


def test_a_header_that_looks_like_a_request_is_not_taken_for_one(exchange, at_once):
    written, _ = exchange([b"GET /livez HTTP/1.1\r\nX: ", WHOLE["no ids"]])
    assert True not in at_once
    assert [body[:9] for _, _, body in replies(written)] == [b'{"status"']


def test_a_reply_waits_for_the_one_before_it(exchange, make_engine, monkeypatch):
    """A request that arrives while a large one is being answered, in a thread, is answered after it."""
    engine, go_on = make_engine(max_ids=60_000), threading.Event()
    lookup_bytes = engine.lookup_bytes

    def slow(table, content, *others):
        assert len(content) < 80 or go_on.wait(10)
        return lookup_bytes(table, content, *others)

    monkeypatch.setattr(engine, "lookup_bytes", slow)
    seen = []
    written, _ = exchange(
        [OTHERS["large"], WHOLE["bytes"]], engine, lambda protocol: seen.append(0) or (len(seen) == 2 and go_on.set())
    )
    assert [len(body) for _, _, body in replies(written)] == [50_000 * 4 + (50_000 - 40) * 4, 3 * 4 + 4]


SHORT, LONG = b'{"ids": [%b]}' % b",".join([b"1"] * 50), b'{"ids": [%b]}' % b",".join([b"1"] * 2000)
SPACES = b'{"ids": [1]}' + b" " * 100_000
WORK = {  # a body, and whether it may be answered on the event loop: 4 KB of JSON are 2,000 ids
    "few ids": (request(USERS, SHORT, JSON, JSON), True),
    "few ids, of codes": (request(ITEMS, SHORT, JSON, JSON), True),
    "few ids, in pieces": (request(USERS, SHORT, JSON, JSON), True),
    "many ids": (request(USERS, LONG, JSON, JSON), False),
    "many ids, of codes": (request(ITEMS, LONG, JSON, JSON), False),
    "many ids, to bytes": (request(ITEMS, LONG, JSON, BINARY), False),
    "many ids, in bags": (
        request(f"{USERS}?pooling=sum", LONG[:-1] + b', "bag_lengths": [2000]}', JSON, JSON), False,
    ),
    "many ids, of several": (request("/v1/lookup", b'{"tables": {"item_id": %b}}' % LONG, JSON, JSON), False),
    "many spaces": (request(USERS, SPACES, JSON, JSON), False),
    "many ids, in bytes": (request(ITEMS, id_bytes([1] * 2000), BINARY, JSON), False),
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_what_a_reply_takes_decides_where_it_is_made(exchange, make_engine, monkeypatch, name):
    sent, is_small = WORK[name]
    engine, threads = make_engine(), set()
    looked_up = engine.metrics.looked_up
    monkeypatch.setattr(
        engine.metrics, "looked_up", lambda *found: (threads.add(threading.current_thread()), looked_up(*found))
    )
    written, _ = exchange([sent[:50], sent[50:]] if "pieces" in name else [sent], engine)
    assert replies(written)[0][0] == b"HTTP/1.1 200 OK"
    assert (threads == {threading.main_thread()}) == is_small


@pytest.mark.parametrize(("limits", "status"), [({"max_in_flight": 1}, b"429"), ({"max_ids": 2}, b"413")])
def test_limits_hold_for_what_is_answered_at_once(exchange, make_engine, limits, status):
    engine = make_engine(**limits)
    with engine.slot() if "max_in_flight" in limits else contextlib.nullcontext():
        written, _ = exchange([WHOLE["bytes"]], engine)
    assert replies(written)[0][0].split()[1] == status


def test_an_engine_that_stops_answers_503(exchange, make_engine):
    engine = make_engine()
    engine.stop()
    assert replies(exchange([WHOLE["bytes"]], engine)[0])[0][0].startswith(b"HTTP/1.1 503")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], b"401"),
        (["X-API-Key: secret"], b"200"),
        (["Authorization: Bearer secret"], b"200"),
        (["X-API-Key: s"], b"401"),
        (["X-API-Key: secret \t"], b"200"),
        (["Authorization: bearer  secret"], b"200"),
        (["Authorization: Basic eDp5"], b"401"),
        (["Authorization: Basic eDp5", "X-API-Key: secret"], b"200"),
        (["Authorization: Bearer secret", "X-API-Key: secret"], b"200"),
        (["X-API-Key: secret", "X-API-Key: secret"], b"200"),
        (["X-API-Key: secret", "X-API-Key: s"], b"401"),
        (["X-API-Key: s", "X-API-Key: secret"], b"401"),
        (["Authorization: Bearer secret", "Authorization: Bearer s"], b"401"),
        (["Authorization: Bearer s", "Authorization: Bearer secret"], b"401"),
        (["Authorization: Bearer secret", "Authorization: Basic eDp5"], b"401"),
        (["Authorization: Bearer secret", "X-API-Key: s"], b"401"),
        (["Authorization: Bearer s", "X-API-Key: secret"], b"401"),
        (["Authorization: Bearer secret", "X-API-Key:"], b"401"),
    ],
)
@pytest.mark.parametrize("path", [USERS, "/v1/tables"])
def test_a_key_is_asked_for(exchange, make_engine, headers, status, path):
    """One alone: which of several counts would be a matter of taste."""
    method = "POST" if path == USERS else "GET"
    written, _ = exchange([request(path, KNOWN, headers=headers, method=method)], make_engine(api_key="secret"))
    assert replies(written)[0][0].split()[1] == status


@pytest.mark.parametrize("name", ["bytes", "unknown id"])
def test_a_client_that_does_not_read_is_answered_when_it_does(exchange, name):
    seen = []

    def pause_then_resume(protocol):
        seen.append(len(replies(bytes(protocol.transport.written))))
        protocol.pause_writing() if len(seen) == 1 else protocol.resume_writing()

    sent = (WHOLE | REFUSED)[name]
    written, _ = exchange([sent, sent], between=pause_then_resume)
    assert seen[1] == seen[0]
    assert len(replies(written)) == 2


def test_requests_answered_at_once_are_counted(exchange, make_engine):
    engine = make_engine()
    exchange([WHOLE["bytes"], WHOLE["bytes"]], engine)
    lines = engine.metrics.render().decode().splitlines()
    labels = 'api="http",code="200",method="POST /v1/tables/{table}/lookup"'
    assert {f"dpq_requests_total{{{labels}}} 2.0", 'dpq_ids_total{table="user_id"} 6.0',
            'dpq_missing_ids_total{table="user_id"} 2.0', "dpq_in_flight_requests 0.0"} <= set(lines)  # fmt: skip
    assert 'dpq_request_seconds_count{api="http",method="POST /v1/tables/{table}/lookup"} 2.0' in lines


def test_server_answers_a_raw_request_with_date_and_length(server, references):
    host, port = server.http.removeprefix("http://").split(":")
    ids = references["item_id"].ids[:5]
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        for _ in range(3):
            connection.sendall(request(body=id_bytes(ids)))
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1 << 16)
            ((status, headers, body),) = replies(head)
            assert re.search(rb"\d\d:\d\d:\d\d GMT", headers[b"date"])
            assert (status, body) == (b"HTTP/1.1 200 OK", references["item_id"].vectors[:5].astype("<f4").tobytes())
            assert headers[b"x-num-rows"] == b"5"
