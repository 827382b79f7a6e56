"""What a connection may keep waiting, or make the server keep. Real sockets; time passes by telling connections so."""

import asyncio
import contextlib
import itertools
import re
import socket

import numpy as np
import pytest
import uvloop

from dpq_rec import EmbeddingStore, IdentityVocabulary, TableContents, write_artifact
from service import http_connection, supervisor, worker
from tests.service.http_requests import BINARY, JSON, USERS, id_bytes

NUM_WIDE, WIDE_DIM = 40_000, 64
WIDE = "/v1/tables/wide/lookup"
LARGE = id_bytes(range(NUM_WIDE))  # 10 MB of vectors, more than sockets hold


ONE = id_bytes([1])


def request(path=USERS, body=ONE, given=BINARY, accept="*/*", method="POST", length=None, headers=()):
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Type: {given}", f"Accept: {accept}"]
    lines += [f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
AT_ONCE = request(accept=BINARY)
SEARCH = request("/v1/tables/user_id/search", b'{"ids": [1]}', JSON)
TABLES = request("/v1/lookup", b'{"tables": {"user_id": {"ids": [1]}}}', JSON)
KINDS = {"at once": AT_ONCE, "ASGI": request(f"{USERS}?missing=error", accept="*/*"), "search": SEARCH, "livez": LIVEZ}


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory):
    rows = np.random.default_rng(1).standard_normal((NUM_WIDE, WIDE_DIM)).astype(np.float32)
    tables = {
        "wide": TableContents(
            num_embeddings=NUM_WIDE, embedding_dim=WIDE_DIM, vocabulary=IdentityVocabulary(NUM_WIDE), chunks=[rows]
        ),
        "user_id": TableContents(
            num_embeddings=40, embedding_dim=1, vocabulary=IdentityVocabulary(40), chunks=[rows[:40, :1].copy()]
        ),
    }
    return EmbeddingStore.open(write_artifact(tmp_path_factory.mktemp("wide") / "artifact", tables, version="v"))


class Served:
    """An engine's HTTP server on the running loop."""

    def __init__(self, engine, server, listening):
        self.engine, self.server, self.listening = engine, server, listening
        self.port = listening.getsockname()[1]

    async def connect(self, sent=b"", small=False):
        """A client's connection; with small buffers of the kernel, so that few replies fill them."""
        sock = socket.socket()
        if small:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 16)
        writer.write(sent)
        connection = Connection(reader, writer)
        number = writer.get_extra_info("sockname")[1]
        while not (found := [c for c in self.connections if c.transport.get_extra_info("peername")[1] == number]):
            await asyncio.sleep(0)
        connection.protocol = found[0]
        if small:
            found[0].transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return connection

    @property
    def connections(self):
        return self.server.server_state.connections

    def pass_time(self, seconds):
        for connection in [*self.connections]:
            connection.check(asyncio.get_running_loop().time() + seconds)

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)


class Connection:
    """The client's end; `protocol` is the server's."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    async def reply(self):
        """Status, head, body; None at the end."""
        async with asyncio.timeout(20):
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionResetError):
                return None
            length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])
            return int(head.split()[1]), head.lower(), await self.reader.readexactly(length)

    async def ask(self, sent):
        self.writer.write(sent)
        return (await self.reply())[0]


@pytest.fixture
def serve(make_engine):
    """serve(scenario, **make_engine's arguments): the result of `await scenario(served)`."""

    def run(scenario, **settings):
        async def main():
            engine = make_engine(**settings)
            server = worker.HttpServer(worker.http_config(engine))
            with supervisor.bind("127.0.0.1", 0, shared=False) as sock:
                task = asyncio.create_task(server.serve(sockets=[sock]))
                while not server.started:
                    await asyncio.sleep(0)
                try:
                    return await scenario(Served(engine, server, sock))
                finally:
                    for connection in [*server.server_state.connections]:
                        connection.transport.abort()
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())

    return run


# Heads, bodies, idle connections


@pytest.mark.parametrize(
    ("sent", "more"),
    [(b"G", b"E"), (b"GET /livez HTTP/1.1\r\nX: ", b"y"), (AT_ONCE + b"POST", b" /"), (b"\r\nGET", b" ")],
)
def test_a_head_that_does_not_arrive_gets_408(serve, sent, more):
    async def scenario(served):
        half = await served.connect(sent)
        first = await half.reply() if sent.startswith(AT_ONCE) else None
        await served.until(lambda: half.protocol.phase is http_connection.Phase.HEAD)
        served.pass_time(4)
        half.writer.write(more)  # does not give it more time
        await asyncio.sleep(0.01)
        is_open = not half.protocol.transport.is_closing()
        served.pass_time(5.1)
        return first, is_open, await half.reply(), await half.reply()

    first, is_open, (status, head, body), end = serve(scenario)
    assert first is None or first[0] == 200
    assert (is_open, status, end) == (True, 408, None)
    assert b"connection: close" in head
    assert b'"error_type":"timeout"' in body


@pytest.mark.parametrize("path", [USERS, "/v1/lookup", "/v1/tables/user_id/search"])
@pytest.mark.parametrize("headers", [(), ("Expect: 100-continue",)], ids=["", "expect"])
def test_a_body_that_does_not_arrive_gets_400(serve, path, headers):
    async def scenario(served):
        half = await served.connect(request(path, b'{"i', JSON, length=12, headers=headers))
        if headers:
            await half.reader.readuntil(b"\r\n\r\n")
        await served.until(lambda: b"in_flight_requests 1.0" in served.engine.metrics.render())
        served.pass_time(29)
        half.writer.write(b"d")
        await asyncio.sleep(0.01)
        served.pass_time(30.1)
        return await half.reply(), await half.reply()

    (status, head, body), end = serve(scenario)
    assert (status, end) == (400, None)
    assert b"connection: close" in head
    assert b"30 s" in body


def test_a_body_that_nobody_reads_has_a_limit_of_time_too(serve):
    async def scenario(served):
        half = await served.connect(LIVEZ.replace(b"\r\n\r\n", b"\r\nContent-Length: 12\r\n\r\n"))
        status = (await half.reply())[0]
        served.pass_time(29)
        is_open = not half.protocol.transport.is_closing()
        served.pass_time(31)
        return status, is_open, await half.reply()

    assert serve(scenario) == (200, True, None)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_connection_is_closed_when_it_was_idle_for_long(serve, kind):
    async def scenario(served):
        idle = await served.connect()
        if kind:
            served.pass_time(74)
            await idle.ask(KINDS[kind])
        served.pass_time(74)
        is_open = not idle.protocol.transport.is_closing()
        served.pass_time(76)
        return is_open, await idle.reply()

    assert serve(scenario) == (True, None)


def test_line_ends_between_requests_are_no_head(serve):
    async def scenario(served):
        idle = await served.connect(AT_ONCE)
        await idle.reply()
        idle.writer.write(b"\r\n")
        await asyncio.sleep(0.01)
        served.pass_time(6)
        return await idle.ask(AT_ONCE)

    assert serve(scenario) == 200


def test_bodies_that_do_not_arrive_keep_nobody_waiting(serve):
    async def scenario(served):
        halves = [await served.connect(request(body=bytes(8), length=16)) for _ in range(20)]
        await served.until(lambda: b"in_flight_requests 20.0" in served.engine.metrics.render())
        other = await served.connect()
        statuses = [await other.ask(sent) for sent in (*KINDS.values(), TABLES)]
        return statuses, [await half.ask(bytes(8)) for half in halves]

    statuses, late = serve(scenario, max_in_flight=1)
    assert statuses == [200] * 5
    assert late == [200] * 20


# Replies that are not read

LARGE_REPLIES = {
    "bytes": request(WIDE, LARGE, accept=BINARY),
    "JSON": request(WIDE, LARGE, accept=JSON),
    "Arrow": request(WIDE, LARGE, accept="application/vnd.apache.arrow.stream"),
    "tables": request("/v1/lookup", b'{"tables": {"wide": {"ids": %b}}}' % str([*range(20_000)]).encode(), JSON),
    "at once": request(WIDE, id_bytes(range(500)), accept=BINARY) * 200,
}


@pytest.mark.parametrize("name", LARGE_REPLIES)
def test_a_reply_that_is_not_read_counts_until_it_is_cut_off(serve, wide_store, name):
    async def scenario(served):
        stalled = await served.connect(LARGE_REPLIES[name])
        await served.until(lambda: stalled.protocol.phase is http_connection.Phase.WRITE)
        await asyncio.sleep(0.05)
        counted = served.engine.num_in_flight, b"in_flight_requests 1.0" in served.engine.metrics.render()
        other = await served.connect()
        refused = await other.ask(AT_ONCE)
        served.pass_time(9)
        is_open = not stalled.protocol.transport.is_closing()
        served.pass_time(11)  # it may have taken some since it stalled
        served.pass_time(11)
        await served.until(lambda: stalled.protocol not in served.connections and not served.engine.num_in_flight)
        return counted, refused, is_open, await other.ask(AT_ONCE)

    assert serve(scenario, store=wide_store, max_in_flight=1) == ((1, True), 429, True, 200)


@pytest.mark.parametrize(("num_taken", "is_sent"), [(1 << 20, True), (1 << 10, False)])
def test_a_reply_that_is_read_slowly_is_sent_whole_if_it_is_read_at_all(serve, wide_store, num_taken, is_sent):
    async def scenario(served):
        slow = await served.connect(LARGE_REPLIES["bytes"], small=True)
        head = await slow.reader.readuntil(b"\r\n\r\n")
        num_left = int(re.search(rb"content-length: (\d+)", head)[1])
        while num_left and not slow.protocol.transport.is_closing():
            num_left -= len(await slow.reader.readexactly(min(num_left, num_taken)))
            await asyncio.sleep(0)
            served.pass_time(11)
        return num_left == 0 and await slow.ask(AT_ONCE)

    assert serve(scenario, store=wide_store) == (200 if is_sent else False)


# Requests that come before they are wanted


@pytest.mark.parametrize("kind", KINDS)
def test_reading_stops_while_requests_wait(serve, kind):
    """And all are answered, in order, when the client reads."""
    sent = KINDS[kind] + b"POST /v1/tables/usr/lookup HTTP/1.1\r\nHost: x\r\n\r\n"
    num_sent = 250_000 // len(sent)

    async def scenario(served):
        eager = await served.connect(small=True)
        eager.writer.write(sent * num_sent)
        await served.until(lambda: eager.protocol.is_write_paused and eager.protocol.is_read_paused)
        await asyncio.sleep(0.05)
        num_waiting = len(eager.protocol._buffer)
        replies = [await eager.reply() for _ in range(2 * num_sent)]
        return num_waiting, [status for status, _, _ in replies]

    num_waiting, statuses = serve(scenario)
    assert num_waiting < 1 << 19
    assert statuses == [200, 404] * num_sent


def test_one_client_that_sends_many_requests_does_not_keep_another_waiting(serve):
    async def scenario(served):
        eager, other = await served.connect(AT_ONCE * 1000), await served.connect()
        status = await other.ask(AT_ONCE)
        num_before = served.server.server_state.total_requests
        for _ in range(1000):
            await eager.reply()
        return status, num_before < 1000

    assert serve(scenario) == (200, True)


# Connections


@pytest.mark.parametrize("sent", [b"", b"GET"])
def test_a_connection_too_many_takes_the_place_of_an_idle_one(serve, monkeypatch, sent):
    """Or of one that has begun with a head and does not go on."""
    monkeypatch.setattr(http_connection, "_IDLE_SECONDS", 0)

    async def scenario(served):
        first = await served.connect(sent)
        await served.until(lambda: (first.protocol.phase is http_connection.Phase.HEAD) == bool(sent))
        second = await served.connect(AT_ONCE)
        await second.reply()
        first.protocol._deadline -= 1  # it has been idle for longer
        third = await served.connect()
        return await first.reply(), await second.ask(LIVEZ), await third.ask(AT_ONCE)

    assert serve(scenario, max_connections=2) == (None, 200, 200)


@pytest.mark.parametrize("sent", [b"GET", request(length=16)], ids=["head", "body"])
def test_a_connection_too_many_is_refused_where_none_is_idle(serve, sent):
    async def scenario(served):
        halves = [await served.connect(sent) for _ in range(2)]
        await served.until(lambda: all(half.protocol.phase is not http_connection.Phase.IDLE for half in halves))
        more = await served.connect(LIVEZ)
        refused = await more.reply(), await more.reply()
        halves[0].writer.close()
        more.writer.close()
        await served.until(lambda: len(served.connections) < 2)
        return refused, await (await served.connect()).ask(LIVEZ)

    ((status, head, body), end), later = serve(scenario, max_connections=2)
    assert (status, end, later) == (503, None, 200)
    assert b"connection: close" in head
    assert b"--max-connections" in body


# The server's end


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_drains_says_close_behind_the_last_request(serve, kind):
    async def scenario(served):
        one, two, idle = await served.connect(AT_ONCE), await served.connect(AT_ONCE), await served.connect()
        await one.reply(), await two.reply()
        served.engine.drain()
        one.writer.write(KINDS[kind])
        two.writer.write(KINDS[kind] * 3)
        got = [await one.reply(), await one.reply()], [await two.reply() for _ in range(4)]
        return *got, idle.protocol.transport.is_closing(), await idle.ask(AT_ONCE)

    one, two, is_closing, status = serve(scenario)
    assert (one[0][0], b"connection: close" in one[0][1], one[1]) == (200, True, None)
    assert [b"connection: close" in reply[1] for reply in two[:3]] == [False, False, True]
    assert [reply and reply[0] for reply in two] == [200, 200, 200, None]
    assert (is_closing, status) == (False, 200)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_ends_answers_what_is_on_its_way(serve, kind):
    """On connections that have been idle, that are new, and that have not been accepted yet."""

    async def scenario(served):
        idle = await served.connect(AT_ONCE)
        await idle.reply()
        new = await served.connect()
        served.engine.drain()
        served.server.should_exit = True
        await served.until(lambda: idle.protocol._is_ending)
        got = [await idle.ask(KINDS[kind]), await new.ask(KINDS[kind])]
        return got, await idle.reply(), await new.reply()

    assert serve(scenario) == ([200, 200], None, None)


def test_a_server_that_ends_closes_what_stays_idle(serve):
    async def scenario(served):
        idle = await served.connect()
        served.server.should_exit = True
        return await idle.reply()

    assert serve(scenario) is None


def test_a_server_that_ends_answers_who_has_connected_but_was_not_accepted(serve):
    async def scenario(served):
        with socket.create_connection(("127.0.0.1", served.port)) as sock:  # the loop does not turn meanwhile
            sock.sendall(AT_ONCE)
            await served.server.shutdown([served.listening])
            return sock.recv(1 << 16)

    assert serve(scenario).startswith(b"HTTP/1.1 200 OK")


# Clients that close their side: who left looks like who only sends no more, and a search is done for neither


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize("kind", ["at once", "ASGI", "livez"])
def test_a_client_that_sends_no_more_gets_its_replies(serve, kind, num_requests):
    async def scenario(served):
        done = await served.connect(KINDS[kind] * num_requests)
        done.writer.write_eof()
        return [await done.reply() for _ in range(num_requests + 1)]

    assert [reply and reply[0] for reply in serve(scenario)] == [200] * num_requests + [None]


@pytest.mark.parametrize("sent", [b"GET", request(length=16), request(length=16, headers=["Expect: 100-continue"])])
def test_a_client_that_leaves_in_the_middle_is_forgotten(serve, sent):
    async def scenario(served):
        half = await served.connect(sent)
        await served.until(lambda: half.protocol.phase is not http_connection.Phase.IDLE)
        half.writer.close()
        await served.until(lambda: not served.connections and not served.server.server_state.tasks)
        return served.engine.num_in_flight, served.engine.metrics.render()

    num_in_flight, rendered = serve(scenario)
    assert num_in_flight == 0
    assert b"dpq_in_flight_requests 0.0" in rendered
    assert (b'code="499"' in rendered) == sent.startswith(b"POST")
    assert b'code="500"' not in rendered


def test_a_long_body_that_is_refused_does_not_lose_its_reply(serve):
    """The client sends all of it before it reads."""

    async def scenario(served):
        sender = await served.connect()
        sender.writer.write(request(body=bytes(500_000)))
        with contextlib.suppress(ConnectionError):
            await sender.writer.drain()
        return await sender.reply(), await sender.reply()

    (status, head, _), end = serve(scenario, max_body_bytes=1000)
    assert (status, end) == (413, None)
    assert b"connection: close" in head


CHUNKED = request(body=b"", accept=BINARY).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


@pytest.mark.parametrize("cuts", [*itertools.combinations(range(0, 60, 13), 2)])
def test_a_chunked_body_may_be_cut_anywhere(serve, cuts):
    body = b"8;x=y\r\n" + id_bytes([1]) + b"\r\n0010\r\n" + id_bytes([2, 3]) + b"\r\n0\r\nT: u\r\n\r\n"

    async def scenario(served):
        one = await served.connect(CHUNKED)
        for begin, end in itertools.pairwise([0, *cuts, len(body)]):
            one.writer.write(body[begin:end])
            await asyncio.sleep(0.002)
        return await one.reply(), await one.ask(LIVEZ)

    (status, head, found), later = serve(scenario)
    assert (status, len(found), later) == (200, 12, 200)
    assert b"x-num-rows: 3" in head


def test_a_body_in_many_small_chunks_is_read(serve):
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in id_bytes(range(1000))) + b"0\r\n\r\n"

    async def scenario(served):
        one = await served.connect(CHUNKED + body)
        return await one.reply()

    assert len(serve(scenario)[2]) == 4 * 1000 + 4 * 960
