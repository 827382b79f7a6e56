"""Calls over gRPC that are malformed, unread, idle or too many: each has one status, and holds no more than it may."""

import asyncio
import contextlib
import logging
import sys

import grpc
import grpc.aio
import pytest

from service import grpc_calls
from service.grpc_api import SERVICE, GrpcServer, _options
from service.grpc_calls import Calls, ReplyRoom
from service.proto.dpq.v1 import embedding_pb2 as pb

Status = grpc.StatusCode
GOOD = pb.LookupRequest(table="user_id", ids=[1, 2]).SerializeToString()
UNARY = ["Lookup", "BatchLookup", "ListTables", "Search"]
# Of a client that takes 64 KiB of what is not read, and no more.
NARROW = [
    ("grpc.http2.lookahead_bytes", 65_535),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_receive_message_length", -1),
]


@pytest.fixture
def serving(make_engine):
    """serving(use, engine=None): the result of `await use(connect)`; connect(options) is a connection of its own."""

    def run(use, engine=None):
        async def scenario():
            server = GrpcServer(engine or make_engine())
            port = await server.start("127.0.0.1:0")
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(server.stop, 0)

                def connect(options=()):
                    alone = [("grpc.use_local_subchannel_pool", 1), *options]
                    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", alone)
                    stack.push_async_callback(channel.close)
                    return channel

                return await use(connect)

        return asyncio.run(scenario())

    return run


def long_request(num_ids):
    return pb.LookupRequest(table="item_id", ids=[3] * num_ids).SerializeToString()


def path(method):
    return f"/{SERVICE}/{method}"


def counted(engine, method, code):
    """How often a method is counted with a code."""
    labels = f'dpq_requests_total{{api="grpc",code="{code}",method="{method}"}} '
    lines = engine.metrics.render().decode().splitlines()
    return sum(float(line.removeprefix(labels)) for line in lines if line.startswith(labels))


async def code_of(call):
    """The status of a call whose replies are read."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError:
        pass
    return await call.code()


async def until(condition):
    """Wait for what happens sooner or later; the test's time limit is its end."""
    while not condition():
        await asyncio.sleep(0.005)


# Messages

MALFORMED = {
    "no field": b"\xff\xff\xff",
    "zeros": bytes(100),
    "cut off": GOOD[:-1] if GOOD[-2] else GOOD[:1],
    "a length beyond the end": b"\x0a\x7f",
}
NO_STRINGS = {"Latin-1 in string_ids": b"\x0a\x01a\x1a\x01\xe9", "Latin-1 in table": b"\x0a\x01\xe9"}
CASES = [(m, raw) for raw in MALFORMED.values() for m in ("Lookup", "StreamLookup", "BatchLookup", "Search")]
CASES += [(m, raw) for raw in NO_STRINGS.values() for m in ("Lookup", "StreamLookup", "Search")]
CASES += [("BatchLookup", b"\x0a\x06" + NO_STRINGS["Latin-1 in string_ids"]), ("ListTables", b"\xff\xff\xff")]


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
@pytest.mark.parametrize(("method", "raw"), CASES)
def test_a_malformed_message_is_an_invalid_argument_with_one_line_and_counted(
    talk, make_engine, caplog, method, raw, compression
):
    async def use(channel):
        await channel.stream_stream(path(method))(iter([raw]), compression=compression).read()

    engine = make_engine()
    with caplog.at_level(logging.DEBUG), pytest.raises(grpc.aio.AioRpcError) as error:
        talk(use, engine)
    assert (error.value.code(), f"got {len(raw)} bytes" in error.value.details()) == (Status.INVALID_ARGUMENT, True)
    lines = [record for record in caplog.records if record.levelno >= logging.INFO]
    assert [(line.name, line.exc_info, "\n" in line.getMessage()) for line in lines] == [("service.grpc", None, False)]
    assert (counted(engine, method, "INVALID_ARGUMENT"), engine.num_in_flight) == (1, 0)


def test_a_stream_answers_what_comes_before_a_malformed_message(talk, make_engine):
    async def use(channel):
        stream = channel.stream_stream(path("StreamLookup"))(iter([GOOD, b"\xff\xff\xff", GOOD]))
        return await stream.read(), await stream.code()

    engine = make_engine()
    reply, code = talk(use, engine)
    assert (pb.LookupReply.FromString(reply).dim, code) == (1, Status.INVALID_ARGUMENT)
    assert [counted(engine, "StreamLookup", code) for code in ("OK", "INVALID_ARGUMENT")] == [1, 1]


@pytest.mark.parametrize("method", UNARY)
def test_a_call_without_its_message_is_an_invalid_argument(talk, make_engine, method):
    async def use(channel):
        await channel.stream_unary(path(method))(iter([]))

    engine = make_engine()
    with pytest.raises(grpc.aio.AioRpcError, match="message: got none, want one") as error:
        talk(use, engine)
    assert (error.value.code(), counted(engine, method, "INVALID_ARGUMENT")) == (Status.INVALID_ARGUMENT, 1)


def test_a_message_that_does_not_come_ends_the_call(talk, make_engine, monkeypatch):
    monkeypatch.setattr(grpc_calls, "_MESSAGE_SECONDS", 0.01)
    monkeypatch.setattr(grpc_calls, "_WATCH_SECONDS", 0.01)

    async def use(channel):
        return await channel.stream_unary(path("Lookup"))().code()

    assert talk(use, make_engine()) == Status.INVALID_ARGUMENT


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
@pytest.mark.parametrize("method", [*UNARY, "StreamLookup"])
def test_a_message_over_the_limit_is_refused_and_logs_nothing(talk, make_engine, caplog, method, compression):
    async def use(channel):
        return await channel.stream_stream(path(method))(iter([bytes(5000)]), compression=compression).code()

    engine = make_engine(max_body_bytes=4000)
    assert talk(use, engine) == Status.RESOURCE_EXHAUSTED
    assert (caplog.records, counted(engine, method, "INVALID_ARGUMENT"), engine.num_in_flight) == ([], 0, 0)


def test_a_call_that_ends_as_its_status_is_sent_leaves_no_traceback(talk, caplog):
    async def use(channel):
        for kind in (grpc.aio.InternalError, ValueError):
            try:
                raise kind
            except kind:
                logging.getLogger("grpc._cython.cygrpc").exception("raised in core")

    talk(use)
    assert [record.exc_info[0] for record in caplog.records] == [ValueError]


def test_details_fit_the_headers_of_a_client(talk):
    async def use(channel):
        request = pb.LookupRequest(table="€\n" * 50_000, ids=[1])
        await channel.unary_unary(path("Lookup"))(request.SerializeToString())

    with pytest.raises(grpc.aio.AioRpcError, match="€") as error:
        talk(use)
    assert error.value.code() == Status.NOT_FOUND


# Keys

KEY, OTHER = "secret", "wrong!"
KEYS = {
    "none": ((), False),
    "one": ((("x-api-key", KEY),), True),
    "the same twice": ((("x-api-key", KEY), ("x-api-key", KEY)), True),
    "the same in both forms": ((("authorization", f"Bearer {KEY}"), ("x-api-key", KEY)), True),
    "another before": ((("x-api-key", OTHER), ("x-api-key", KEY)), False),
    "another behind": ((("x-api-key", KEY), ("x-api-key", OTHER)), False),
    "another bearer before": ((("authorization", f"Bearer {OTHER}"), ("authorization", f"Bearer {KEY}")), False),
    "another bearer behind": ((("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {OTHER}")), False),
    "another scheme behind": ((("authorization", f"Bearer {KEY}"), ("authorization", f"Basic {KEY}")), False),
    "another in the other form": ((("authorization", f"Bearer {KEY}"), ("x-api-key", OTHER)), False),
    "an empty one behind": ((("x-api-key", KEY), ("x-api-key", "")), False),
}


@pytest.mark.parametrize("method", ["Lookup", "StreamLookup"])
@pytest.mark.parametrize(("metadata", "is_right"), KEYS.values(), ids=KEYS)
def test_a_call_is_answered_with_one_key_alone(talk, make_engine, method, metadata, is_right):
    async def use(channel):
        return await code_of(channel.stream_stream(path(method))(iter([GOOD]), metadata=metadata))

    assert talk(use, make_engine(api_key=KEY)) == (Status.OK if is_right else Status.UNAUTHENTICATED)


@pytest.mark.parametrize("method", [*UNARY, "StreamLookup"])
def test_a_call_without_a_key_is_refused_before_its_message(talk, make_engine, method):
    async def use(channel):
        return await channel.stream_stream(path(method))().code()  # nothing is sent, nor ended

    engine = make_engine(api_key=KEY)
    assert talk(use, engine) == Status.UNAUTHENTICATED
    assert counted(engine, method, "UNAUTHENTICATED") == 1


# Calls and replies at a time


def test_calls_beyond_the_limit_are_refused_and_their_places_come_back(serving, make_engine):
    async def use(connect):
        streams = [connect().stream_stream(path("StreamLookup"))() for _ in range(4)]
        for stream in streams:
            await stream.write(GOOD)
            await stream.read()
        refused = await code_of(connect().unary_stream(path("ListTables"))(b""))
        await streams[0].done_writing()
        assert await code_of(streams[0]) == Status.OK
        return refused, await code_of(connect().unary_stream(path("ListTables"))(b""))

    engine = make_engine(max_calls=4)
    assert serving(use, engine) == (Status.RESOURCE_EXHAUSTED, Status.OK)


def test_connections_beyond_the_limit_are_closed_and_their_places_come_back(make_engine):
    most = 3

    async def is_taken(port, stack):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        stack.callback(writer.close)
        try:
            return await reader.read(1) != b""  # a server begins with its settings
        except ConnectionResetError:
            return False

    async def scenario():
        server = GrpcServer(make_engine(max_connections=most))
        port = await server.start("127.0.0.1:0")
        async with contextlib.AsyncExitStack() as stack:
            taken = [await is_taken(port, stack) for _ in range(most + 2)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            reply = await channel.unary_unary(path("Lookup"))(GOOD, wait_for_ready=True)
        await server.stop(0)
        return taken, reply

    taken, reply = asyncio.run(scenario())
    assert taken == [True] * most + [False] * 2
    assert reply


def test_one_connection_holds_a_quarter_of_the_calls(serving, make_engine):
    async def use(connect):
        channel = connect()
        stream = channel.stream_stream(path("StreamLookup"))()
        await stream.write(GOOD)
        await stream.read()
        waiting = asyncio.create_task(code_of(channel.unary_stream(path("Lookup"))(GOOD)))
        of_others = await code_of(connect().unary_stream(path("Lookup"))(GOOD))
        assert not waiting.done()
        await stream.done_writing()
        return await code_of(stream), of_others, await waiting

    assert serving(use, make_engine(max_calls=4)) == (Status.OK,) * 3


@pytest.mark.parametrize("method", ["Lookup", "StreamLookup"])
def test_replies_that_are_not_read_count_as_in_flight(serving, make_engine, method):
    engine = make_engine(max_in_flight=2)

    async def use(connect):
        channel = connect(NARROW)
        unread = [channel.unary_stream(path(method))(long_request(20_000)) for _ in range(2)]
        await until(lambda: counted(engine, method, "OK") == 2)
        seen = [engine.num_in_flight, await channel.unary_unary(path("Lookup"))(GOOD).code()]
        for call in unread:
            await call.read()
        await until(lambda: not engine.num_in_flight)
        return [*seen, await channel.unary_unary(path("Lookup"))(GOOD).code()]

    assert serving(use, engine) == [2, Status.RESOURCE_EXHAUSTED, Status.OK]


def test_replies_that_are_left_unread_give_their_slots_back(serving, make_engine):
    engine = make_engine()

    async def use(connect):
        channel = connect(NARROW)
        for method in ("Lookup", "BatchLookup", "StreamLookup"):
            message = pb.BatchLookupRequest(requests=[pb.LookupRequest.FromString(long_request(20_000))])
            raw = message.SerializeToString() if method == "BatchLookup" else long_request(20_000)
            call = channel.unary_stream(path(method))(raw)
            await until(lambda method=method: counted(engine, method, "OK"))
            call.cancel()
            await until(lambda: not engine.num_in_flight)

    serving(use, engine)


def test_large_replies_wait_for_those_that_are_not_read(serving, make_engine, monkeypatch):
    """Twelve streams that are not read: no more than two replies are there at a time, and all come when they are."""
    num_ids = 20_000
    monkeypatch.setattr(grpc_calls, "_REPLY_BYTES", 5 * num_ids * 24 * 4 // 2)
    engine, at_a_time = make_engine(), []
    lookup = engine.lookup
    monkeypatch.setattr(
        engine, "lookup", lambda requests: (at_a_time.append(engine.num_in_flight), lookup(requests))[1]
    )

    async def use(connect):
        channel = connect(NARROW)
        streams = [channel.unary_stream(path("StreamLookup"))(long_request(num_ids)) for _ in range(12)]
        await until(lambda: counted(engine, "StreamLookup", "OK") == 2)
        await channel.unary_unary(path("Lookup"))(GOOD)  # a small one need not wait
        return await asyncio.gather(*(stream.read() for stream in streams))

    replies = serving(use, engine)
    assert {len(pb.LookupReply.FromString(reply).vectors) for reply in replies} == {num_ids * 24 * 4}
    assert (len(at_a_time), max(at_a_time)) == (13, 3)


def test_a_stream_keeps_neither_message_nor_reply_once_it_is_sent(make_engine):
    class Context:
        def __init__(self):
            self.num_names, self.kept = [], None

        def add_done_callback(self, callback):
            pass

        async def read(self):
            if self.kept is None:
                self.kept = [bytes(1000)]
                return self.kept[0]
            self.num_names = [sys.getrefcount(each) for each in self.kept]
            return grpc.aio.EOF

        async def write(self, reply):
            self.kept.append(reply)

    async def respond(message):
        return b"a" + message

    async def scenario():
        context = Context()
        await Calls(make_engine()).stream("StreamLookup", respond, None, context)
        return context.num_names

    assert asyncio.run(scenario()) == [3, 3]  # the list's, the loop's and the call's


@pytest.mark.parametrize("method", ["Lookup", "StreamLookup"])
def test_a_caller_who_does_not_read_loses_its_connection(serving, make_engine, caplog, method):
    engine = make_engine(send_seconds=0)

    async def use(connect):
        channel = connect(NARROW)
        call = channel.unary_stream(path(method))(long_request(2000))  # more than gRPC keeps for a caller
        await until(lambda: "has not taken a reply of" in caplog.text)
        await until(lambda: not engine.num_in_flight)
        return await call.code()

    assert serving(use, engine) == Status.UNAVAILABLE
    assert "its connection is closed" in caplog.text


def test_only_the_connection_of_the_peer_is_hung_up(talk, make_engine):
    engine = make_engine()

    async def use(channel):
        await channel.unary_unary(path("Lookup"))(GOOD)
        return grpc_calls.hang_up("ipv4:127.0.0.1:1", 1), grpc_calls.hang_up("ipv6:%5B::1%5D:1", 1)

    assert talk(use, engine) == (False, False)


def test_reply_room_is_given_in_the_order_of_asking():
    async def scenario():
        room, order = ReplyRoom(10), []
        give_back = await room.take(8)

        async def take(num_bytes):
            give = await room.take(num_bytes)
            order.append(num_bytes)
            give()

        tasks = [asyncio.create_task(take(num_bytes)) for num_bytes in (9, 1, 100)]
        await asyncio.sleep(0)
        assert order == []
        give_back()
        await asyncio.gather(*tasks)
        return order, room._left

    assert asyncio.run(scenario()) == ([9, 1, 100], 10)


def test_reply_room_of_one_who_left_goes_to_the_next():
    async def scenario():
        room = ReplyRoom(10)
        give_back = await room.take(10)
        left, also_left, next_one = (asyncio.create_task(room.take(10)) for _ in range(3))
        await asyncio.sleep(0)
        left.cancel()
        give_back()
        also_left.cancel()  # the room is its own by now, and it does not know yet
        give = await next_one
        give()
        return room._left

    assert asyncio.run(scenario()) == 10


# Keepalive


def keepalive(seconds):
    """What a client of long streams commonly sets."""
    return [
        ("grpc.keepalive_time_ms", round(1000 * seconds)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ping_seconds", "wait_seconds", "settings"), [(10, 65, {}), (1, 8, {"min_ping_seconds": 0.5})]
)
def test_an_idle_stream_whose_client_pings_goes_on(serving, make_engine, ping_seconds, wait_seconds, settings):
    async def use(connect):
        stream = connect(keepalive(ping_seconds)).stream_stream(path("StreamLookup"))()
        without_calls = connect(keepalive(ping_seconds))
        await without_calls.unary_unary(path("Lookup"))(GOOD)
        await asyncio.sleep(wait_seconds)
        await stream.write(GOOD)
        is_connected = without_calls.get_state() is grpc.ChannelConnectivity.READY
        return pb.LookupReply.FromString(await stream.read()).dim, is_connected

    assert serving(use, make_engine(**settings)) == (1, True)


@pytest.mark.slow
def test_a_client_that_pings_faster_than_is_allowed_is_disconnected(serving, make_engine):
    async def use(connect):
        return await connect(keepalive(1)).stream_stream(path("StreamLookup"))().code()

    assert serving(use, make_engine(min_ping_seconds=60)) == Status.UNAVAILABLE


def test_min_ping_seconds_is_what_grpc_is_told(make_engine):
    options = dict(_options(make_engine(min_ping_seconds=0.25)))
    assert options["grpc.http2.min_ping_interval_without_data_ms"] == 250
    assert options["grpc.keepalive_permit_without_calls"] == 1
