"""Clients that keep a real server busy, or make it keep what they send or do not read: others are answered still."""

import contextlib
import re
import socket
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from dpq_rec import IdentityVocabulary, TableContents, write_artifact
from tests.service.conftest import Server

DIM, NUM_IDS, LIMIT, MOST_CONNECTIONS = 128, 65_536, 2, 350
LOOKUP = b"POST /v1/tables/t/lookup HTTP/1.1\r\nHost: x\r\nAccept: %b\r\nContent-Type: application/octet-stream\r\n"
BINARY, JSON, ARROW = b"application/octet-stream", b"application/json", b"application/vnd.apache.arrow.stream"
GET_LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
MB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    rows = np.ones((1, DIM), np.float32)
    tables = {"t": TableContents(num_embeddings=1, embedding_dim=DIM, vocabulary=IdentityVocabulary(1), chunks=[rows])}
    artifact = write_artifact(tmp_path_factory.mktemp("limits") / "artifact", tables, version="v")
    limits = (f"--max-in-flight={LIMIT}", f"--max-connections={MOST_CONNECTIONS}")
    server = Server(artifact, "--workers=1", *limits, "--stop-seconds=0").wait_until_ready()
    yield server
    assert server.end()[0] == 0


def connect(server):
    host, port = server.http.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def lookup(num_ids, accept=BINARY):
    body = bytes(8 * num_ids)
    return LOOKUP % accept + b"Content-Length: %d\r\n\r\n" % len(body) + body


class Growth:
    """By how much a worker's memory has grown at most since it was made."""

    def __init__(self, server):
        (pid,) = server.worker_pids()
        self.process = Path(f"/proc/{pid}")
        (self.process / "clear_refs").write_text("5")  # the most that it has had is what it has
        self.before = self._most()

    def _most(self):
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", (self.process / "status").read_text())[1])

    def num_bytes(self):
        return self._most() - self.before


def is_well(server, lookups=True):
    """Whether others are answered."""
    statuses = [server.web.get("/livez").status_code, server.web.get("/readyz").status_code]
    if lookups:
        statuses.append(server.web.post("/v1/tables/t/lookup", json={"ids": [0]}).status_code)
    return statuses == [200] * len(statuses)


@pytest.mark.parametrize(("accept", "most"), [(BINARY, 400 * MB), (ARROW, 600 * MB)], ids=["bytes", "Arrow"])
def test_callers_who_do_not_read_are_no_more_than_the_limit(server, accept, most):
    """Of 30 callers that read 12 bytes of 32 MB, as many as are allowed get a reply; the others may come back."""
    growth = Growth(server)
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(connect(server)) for _ in range(30)]
        for caller in callers:
            caller.sendall(lookup(NUM_IDS, accept))
        statuses = [caller.recv(12)[-3:] for caller in callers]
        assert sorted(statuses) == [b"200"] * LIMIT + [b"429"] * (30 - LIMIT)
        assert "dpq_in_flight_requests 2.0" in server.web.get("/metrics").text
        assert is_well(server, lookups=False)
        assert growth.num_bytes() < most
        assert server.web.post("/v1/tables/t/lookup", json={"ids": [0]}).status_code == 429
    end = time.monotonic() + 10
    while not is_well(server):
        assert time.monotonic() < end


@pytest.mark.parametrize("sent", [lookup(1), GET_LIVEZ, lookup(1).replace(b"tables/t", b"tables/u")])
def test_requests_whose_replies_are_not_read_are_not_read_either(server, sent):
    growth = Growth(server)
    with connect(server) as caller:
        caller.settimeout(0.5)
        num_sent, data = 0, sent * (MB // len(sent))
        with contextlib.suppress(TimeoutError):
            while num_sent < 100 * MB:
                num_sent += caller.send(data)
        assert num_sent < 100 * MB
        assert is_well(server)
        assert growth.num_bytes() < 30 * MB


HALVES = {
    "heads": b"GET /livez HTTP/1.1\r\nHost: x\r\nX: ",
    "bodies": lookup(2)[:-8],
    "chunks": LOOKUP % BINARY + b"Transfer-Encoding: chunked\r\n\r\n10\r\n" + bytes(8),
    "bodies that wait for a 100": LOOKUP % BINARY + b"Content-Length: 8\r\nExpect: 100-continue\r\n\r\n",
    "upgrades": GET_LIVEZ[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\nPRI * HT",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HALVES)
def test_halves_of_requests_keep_nobody_waiting(server, name):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(server)).sendall(HALVES[name])
        assert is_well(server)


def test_more_connections_than_are_allowed_leave_room_for_another(server):
    """They are idle."""
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_CONNECTIONS - 10):
            stack.enter_context(connect(server))
        time.sleep(1.1)  # an idle connection may be closed after a second
        for _ in range(100):
            stack.enter_context(connect(server))
        assert is_well(server)


ENDLESS = {
    "a header": GET_LIVEZ[:-2] + b"X: ",
    "headers": GET_LIVEZ[:-2],
    "a path": b"GET /",
    "an extension": LOOKUP % BINARY + b"Transfer-Encoding: chunked\r\n\r\n8;",
    "a body": LOOKUP % BINARY + b"Content-Length: 1000000000\r\n\r\n",
    "chunks": LOOKUP % BINARY + b"Transfer-Encoding: chunked\r\n\r\n",
}
PIECES = {"headers": b"X: y\r\n", "chunks": b"4\r\nxxxx\r\n"}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_refused_early(server, name):
    growth, piece = Growth(server), PIECES.get(name, b"x")
    with connect(server) as caller, pytest.raises(OSError, match=r"reset|pipe"):
        caller.sendall(ENDLESS[name] + piece * (20 * MB // len(piece)))
    assert is_well(server)
    assert growth.num_bytes() < 40 * MB


def test_a_length_without_a_body_is_refused_before_it_arrives(server):
    with connect(server) as caller:
        caller.sendall(LOOKUP % BINARY + b"Content-Length: 1000000000\r\n\r\n")
        assert caller.recv(12) == b"HTTP/1.1 413"


def test_a_body_that_says_it_is_empty_is_not_looked_up_as_more(server):
    with connect(server) as caller:
        caller.sendall(LOOKUP % BINARY + b"Content-Length: 0\r\n\r\n" + struct.pack("<q", 0) + GET_LIVEZ)
        data = b""
        while piece := caller.recv(1 << 16):
            data += piece
    assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200", b"400"]
