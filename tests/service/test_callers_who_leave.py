"""Callers who leave: what nobody waits for any more is not done, and counts as left."""

import asyncio
import threading

import grpc
import numpy as np
import pytest
from uvicorn.server import ServerState

from dpq_rec.table import Table
from service import worker
from service.http_app import create_app
from service.proto.dpq.v1 import embedding_pb2 as pb
from service.proto.dpq.v1 import embedding_pb2_grpc as pb_grpc
from tests.service.http_requests import BINARY, ITEMS, JSON, id_bytes

SEARCH = "/v1/tables/item_id/search"


class Caller:
    """An ASGI request whose caller may leave."""

    def __init__(self, app, path, body, given=JSON, method="POST"):
        self.sent, self._is_gone, self._body = [], asyncio.Event(), [body]
        headers = [(b"content-type", given.encode()), (b"accept", given.encode())]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
        self._task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self):
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self._is_gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.sent.append(message)

    async def leave(self):
        self._is_gone.set()
        await self._task

    async def status(self):
        await self._task
        return self.sent[0]["status"]


class Gate:
    """A function that waits in its thread until it is opened."""

    def __init__(self, function):
        self.num_begun, self.is_open, self._function = 0, threading.Event(), function

    def __call__(self, *args, **kwargs):
        self.num_begun += 1
        assert self.is_open.wait(60)
        return self._function(*args, **kwargs)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def http_counts(engine, route):
    lines = engine.metrics.render().decode().splitlines()
    found = [
        line.split('code="')[1].partition('"')
        for line in lines
        if f'method="POST {route}"' in line and "_requests_total" in line
    ]
    return {code: float(rest.rpartition(" ")[2]) for code, _, rest in found}


def test_eight_searches_of_callers_who_left_are_not_done_and_the_next_caller_is_answered(make_engine, monkeypatch):
    engine = make_engine()
    gate = Gate(Table.search)
    monkeypatch.setattr(Table, "search", lambda *args, **kwargs: gate(*args, **kwargs))

    async def scenario():
        app = create_app(engine)
        callers = [Caller(app, SEARCH, b'{"ids": [1]}') for _ in range(8)]
        await until(lambda: engine._num_searches == 8 and gate.num_begun == 1)
        await asyncio.gather(*(caller.leave() for caller in callers))
        assert [caller.sent for caller in callers] == [[]] * 8
        next_one = Caller(app, SEARCH, b'{"ids": [1]}')
        await until(lambda: engine._num_searches == 1)
        gate.is_open.set()
        return await next_one.status()

    assert asyncio.run(scenario()) == 200
    assert gate.num_begun == 2  # the one that was under way, and the last
    assert http_counts(engine, "/v1/tables/{table}/search") == {"499": 8, "200": 1}
    assert engine.num_in_flight == 0


def test_a_search_whose_connection_is_closed_is_not_done(make_engine, monkeypatch):
    engine = make_engine()
    gate = Gate(Table.search)
    monkeypatch.setattr(Table, "search", lambda *args, **kwargs: gate(*args, **kwargs))
    head = f"POST {SEARCH} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: 12\r\n\r\n"

    async def scenario():
        config = worker.http_config(engine)
        config.load()
        server = await asyncio.get_running_loop().create_server(
            lambda: config.http_protocol_class(config=config, server_state=ServerState(), app_state={}), "127.0.0.1", 0
        )
        async with server:
            writers = []
            for _ in range(3):
                _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
                writer.write(head.encode() + b'{"ids": [1]}')
                writers.append(writer)
            await until(lambda: engine._num_searches == 3 and gate.num_begun == 1)
            for writer in writers:
                writer.close()
            await until(lambda: not engine._num_searches)
            gate.is_open.set()
            await until(lambda: not engine.num_in_flight)

    asyncio.run(scenario())
    assert gate.num_begun == 1
    assert http_counts(engine, "/v1/tables/{table}/search") == {"499": 3}


def test_a_search_under_way_ends_where_its_caller_leaves(make_engine, monkeypatch):
    engine, ended = make_engine(), threading.Event()

    def search(table, queries, k, *, similarity, check):
        try:
            while True:
                check()
        finally:
            ended.set()

    monkeypatch.setattr(Table, "search", search)

    async def scenario():
        caller = Caller(create_app(engine), SEARCH, b'{"ids": [1]}')
        await until(lambda: engine._num_searches == 1)
        await caller.leave()
        await until(ended.is_set)

    asyncio.run(scenario())


def test_a_grpc_search_under_way_ends_where_its_caller_leaves(talk, make_engine, monkeypatch):
    engine, begun, ended = make_engine(), threading.Event(), threading.Event()

    def search(table, queries, k, *, similarity, check):
        begun.set()
        try:
            while True:
                check()
        finally:
            ended.set()

    monkeypatch.setattr(Table, "search", search)

    async def use(channel):
        call = pb_grpc.EmbeddingServiceStub(channel).Search(pb.SearchRequest(table="item_id", ids=[1]))
        await until(begun.is_set)
        call.cancel()
        await until(ended.is_set)
        await until(lambda: not engine.num_in_flight)

    talk(use, engine)
    assert 'code="CANCELLED",method="Search"} 1.0' in engine.metrics.render().decode()


LARGE = {
    "bytes": (ITEMS, id_bytes(range(60_000)), BINARY, "/v1/tables/{table}/lookup"),
    "JSON": (ITEMS, b'{"ids": [%b]}' % b",".join([b"1"] * 60_000), JSON, "/v1/tables/{table}/lookup"),
    "several tables": (
        "/v1/lookup", b'{"tables": {"item_id": {"ids": [%b]}}}' % b",".join([b"1"] * 60_000), JSON, "/v1/lookup"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body", "given", "route"), LARGE.values(), ids=LARGE)
def test_queued_lookups_of_callers_who_left_are_not_done(make_engine, monkeypatch, path, body, given, route):
    engine = make_engine(threads=1)
    gate = Gate(engine.check_num_ids)
    monkeypatch.setattr(engine, "check_num_ids", gate)

    async def scenario():
        app = create_app(engine)
        callers = [Caller(app, path, body, given) for _ in range(5)]
        await until(lambda: engine.num_in_flight == 5 and gate.num_begun == 1)
        await asyncio.gather(*(caller.leave() for caller in callers))
        next_one = Caller(app, path, body, given)
        await until(lambda: engine.num_in_flight == 1)
        num_begun = gate.num_begun
        gate.is_open.set()
        return num_begun, await next_one.status()

    assert asyncio.run(scenario()) == (1, 200)
    assert http_counts(engine, route) == {"499": 5, "200": 1}


def test_queued_grpc_lookups_of_callers_who_left_are_not_done(talk, make_engine, monkeypatch):
    engine = make_engine(threads=1)
    gate = Gate(engine.check_num_ids)
    monkeypatch.setattr(engine, "check_num_ids", gate)

    async def use(channel):
        stub = pb_grpc.EmbeddingServiceStub(channel)
        request = pb.LookupRequest(table="item_id", ids=[1] * 20_000)
        calls = [stub.Lookup(request) for _ in range(5)]
        await until(lambda: engine.num_in_flight == 5 and gate.num_begun == 1)
        for call in calls:
            call.cancel()
        await until(lambda: not engine.num_in_flight)
        next_one = stub.Lookup(request)
        await until(lambda: engine.num_in_flight == 1)
        num_begun = gate.num_begun
        gate.is_open.set()
        return num_begun, await next_one.code()

    assert talk(use, engine) == (1, grpc.StatusCode.OK)


# The scan itself


@pytest.mark.parametrize("table", ["item_id", "user_id"])
def test_search_asks_before_each_block_of_rows_whether_to_go_on(store, monkeypatch, table):
    monkeypatch.setattr("dpq_rec.search._BLOCK_ROWS", 7)
    monkeypatch.setattr("dpq_rec.search._BLOCK_NUMBERS", 7)
    num_asked = 0

    def check():
        nonlocal num_asked
        num_asked += 1
        if num_asked == 4:
            raise InterruptedError

    dim = store.table(table).manifest.embedding_dim
    with pytest.raises(InterruptedError):
        store.search(table, np.ones((1, dim)), 3, check=check)
    assert num_asked == 4


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("table", ["item_id", "user_id"])
def test_search_finds_the_same_in_blocks(store, monkeypatch, table, similarity):
    dim = store.table(table).manifest.embedding_dim
    queries_QE = np.random.default_rng(0).standard_normal((3, dim))
    whole = store.search(table, queries_QE, 20, similarity=similarity)
    monkeypatch.setattr("dpq_rec.search._BLOCK_ROWS", 7)
    in_blocks = store.search(table, queries_QE, 20, similarity=similarity)
    np.testing.assert_array_equal(whole.ids, in_blocks.ids)
    np.testing.assert_array_equal(whole.scores, in_blocks.scores)
