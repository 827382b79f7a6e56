"""The gRPC API in this process: every form of request and reply, and every status of contract 5."""

import asyncio
import logging
import threading

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.grpc_api import SERVICE, GrpcServer
from service.proto.dpq.v1 import embedding_pb2 as pb
from service.proto.dpq.v1 import embedding_pb2_grpc as pb_grpc

Status = grpc.StatusCode


@pytest.fixture
def lookup(talk):
    """lookup(engine=None, **fields of LookupRequest): the reply, or an AioRpcError."""

    def send(engine=None, **fields):
        return talk(lambda channel: pb_grpc.EmbeddingServiceStub(channel).Lookup(pb.LookupRequest(**fields)), engine)

    return send


def vectors_of(reply):
    return np.frombuffer(reply.vectors, "<f2" if reply.dtype == pb.FLOAT16 else "<f4").reshape(-1, reply.dim)


# Lookups


@pytest.mark.parametrize(("dtype", "name"), [(pb.FLOAT32, "float32"), (pb.FLOAT16, "float16")])
@pytest.mark.parametrize("num_ids", [1, 400])
def test_lookup_gives_the_vectors_of_the_reference(lookup, references, dtype, name, num_ids):
    ids = [10**15, *references["item_id"].ids[:num_ids].tolist(), -(10**15)]
    reply = lookup(table="item_id", ids=ids, dtype=dtype)
    vectors, missing = references["item_id"].lookup(ids, name)
    np.testing.assert_array_equal(vectors_of(reply), vectors)
    assert (list(reply.missing), reply.dim, reply.dtype, reply.version) == (missing, 24, dtype, "test-1")


def test_lookup_of_no_ids_gives_no_vectors(lookup):
    reply = lookup(table="item_id")
    assert (reply.vectors, list(reply.missing), reply.dim) == (b"", [], 24)


@pytest.mark.parametrize(("dtype", "name"), [(pb.FLOAT32, "float32"), (pb.FLOAT16, "float16")])
@pytest.mark.parametrize("pooling", [pb.SUM, pb.MEAN])
def test_lookup_pools_bags_in_fp32_in_the_order_of_the_ids(lookup, references, pooling, dtype, name):
    ids = references["item_id"].ids[:20].tolist()
    ids[3] = ids[9] = 10**15
    bag_lengths = [0, 9, 1, 0, 10, 0]  # the third bag holds a missing id alone
    reply = lookup(table="item_id", ids=ids, bag_lengths=bag_lengths, pooling=pooling, dtype=dtype)
    vectors, missing = references["item_id"].lookup(ids)
    wanted, start = [], 0
    for length in bag_lengths:
        total, count = np.zeros(24, np.float32), 0
        for at in range(start, start + length):
            if at not in missing:
                total, count = total + vectors[at], count + 1
        wanted.append(total / np.float32(count) if count and pooling == pb.MEAN else total)
        start += length
    np.testing.assert_array_equal(vectors_of(reply), np.array(wanted).astype(name))
    assert list(reply.missing) == missing == [3, 9]


def test_lookup_of_no_bags_gives_no_vectors(lookup):
    assert lookup(table="item_id", pooling=pb.SUM).vectors == b""


def test_batch_lookup_answers_each_request_in_order_from_one_version(talk, references):
    requests = [
        pb.LookupRequest(table="user_id", ids=[3, 99]),
        pb.LookupRequest(table="item_id", ids=references["item_id"].ids[:4].tolist(), dtype=pb.FLOAT16),
        pb.LookupRequest(table="user_id", ids=[3, 4], bag_lengths=[2], pooling=pb.MEAN),
    ]
    batch = pb.BatchLookupRequest(requests=requests)
    replies = talk(lambda channel: pb_grpc.EmbeddingServiceStub(channel).BatchLookup(batch)).replies
    users = references["user_id"].vectors
    np.testing.assert_array_equal(vectors_of(replies[0]), [users[3], [0]])
    np.testing.assert_array_equal(vectors_of(replies[1]), references["item_id"].vectors[:4].astype(np.float16))
    np.testing.assert_array_equal(vectors_of(replies[2]), (users[3:4] + users[4:5]) / np.float32(2))
    assert {reply.version for reply in replies} == {"test-1"}
    assert list(replies[0].missing) == [1]


def test_stream_lookup_answers_each_request_in_order_as_it_comes(talk, make_engine, references):
    engine, known = make_engine(), references["item_id"].ids

    async def use(channel):
        stream = pb_grpc.EmbeddingServiceStub(channel).StreamLookup()
        found = []
        for num_ids in (1, 400, 0, 3):
            await stream.write(pb.LookupRequest(table="item_id", ids=[*known[:num_ids].tolist(), 10**15]))
            found.append(await stream.read())
        await stream.done_writing()
        return found, await stream.read() is grpc.aio.EOF, await stream.code()

    found, ended, code = talk(use, engine)
    for reply, num_ids in zip(found, (1, 400, 0, 3), strict=True):
        np.testing.assert_array_equal(vectors_of(reply)[:-1], references["item_id"].vectors[:num_ids])
        assert (list(reply.missing), reply.version) == ([num_ids], "test-1")
    assert (ended, code, engine.num_in_flight) == (True, Status.OK, 0)
    counted = 'dpq_requests_total{api="grpc",code="OK",method="StreamLookup"} 4.0'
    assert counted in engine.metrics.render().decode().splitlines()


def test_stream_lookup_ends_with_the_first_request_that_fails(talk):
    async def use(channel):
        stream = pb_grpc.EmbeddingServiceStub(channel).StreamLookup()
        await stream.write(pb.LookupRequest(table="user_id", ids=[1]))
        first = await stream.read()
        await stream.write(pb.LookupRequest(table="usr", ids=[1]))  # the last: what is sent as a stream ends may raise
        with pytest.raises(grpc.aio.AioRpcError, match="it has: item_id, user_id"):
            await stream.read()
        return first.dim, await stream.code()

    assert talk(use) == (1, Status.NOT_FOUND)


def test_stream_lookup_refuses_a_wrong_key_and_too_many_ids(talk, make_engine):
    async def use(channel):
        stub, codes = pb_grpc.EmbeddingServiceStub(channel), []
        for metadata in ((), (("x-api-key", "secret"),)):
            stream = stub.StreamLookup(iter([pb.LookupRequest(table="item_id", ids=range(301))]), metadata=metadata)
            codes.append(await stream.code())
        return codes

    codes = talk(use, make_engine(api_key="secret", max_ids=300))
    assert codes == [Status.UNAUTHENTICATED, Status.RESOURCE_EXHAUSTED]


def test_list_tables_describes_every_table(talk, make_engine):
    engine = make_engine()
    reply = talk(lambda channel: pb_grpc.EmbeddingServiceStub(channel).ListTables(pb.ListTablesRequest()), engine)
    assert (reply.version, [table.name for table in reply.tables]) == ("test-1", ["item_id", "user_id"])
    for table, info in zip(reply.tables, engine.list_tables(), strict=True):
        assert {f.name: getattr(table, f.name) for f in pb.TableInfo.DESCRIPTOR.fields} == vars(info)


def test_lookup_takes_string_ids(lookup, make_engine, string_store):
    reply = lookup(make_engine(store=string_store), table="name", string_ids=["ü", "b", "", "7", "a", "ü"])
    assert vectors_of(reply).tolist() == [[2, -1], [0, 0], [3, -2], [3, -2], [1, 0], [2, -1]]
    assert list(reply.missing) == [1]


def test_lookup_pools_bags_of_strings(lookup, make_engine, string_store):
    bags = {"string_ids": ["ü", "b", "7", "a"], "bag_lengths": [3, 0, 1], "pooling": pb.MEAN}
    reply = lookup(make_engine(store=string_store), table="name", **bags)
    assert (vectors_of(reply).tolist(), list(reply.missing)) == ([[2.5, -1.5], [0, 0], [1, 0]], [1])


def test_lookup_of_no_string_ids_gives_no_vectors(lookup, make_engine, string_store):
    reply = lookup(make_engine(store=string_store), table="name")
    assert (reply.vectors, list(reply.missing), reply.dim) == (b"", [], 2)


def test_list_tables_says_which_have_string_ids(talk, make_engine, string_store):
    request = pb.ListTablesRequest()
    reply = talk(
        lambda channel: pb_grpc.EmbeddingServiceStub(channel).ListTables(request), make_engine(store=string_store)
    )
    assert [(table.name, table.vocabulary) for table in reply.tables] == [("name", "string"), ("user_id", "identity")]


# Errors

ERRORS = {
    "both kinds of ids": ({"table": "item_id", "ids": [1], "string_ids": ["a"]}, Status.INVALID_ARGUMENT, "got both"),
    "strings for integers": ({"table": "item_id", "string_ids": ["a"]}, Status.INVALID_ARGUMENT, "wants integers"),
    "bags that do not sum": (
        {"table": "item_id", "ids": [1, 2], "bag_lengths": [1], "pooling": pb.SUM}, Status.INVALID_ARGUMENT, "sum of 1"
    ),
    "pooling without bags": (
        {"table": "item_id", "ids": [1], "pooling": pb.MEAN}, Status.INVALID_ARGUMENT, "a sum of 0, want the 1 ids"
    ),
    "bags without pooling": (
        {"table": "item_id", "ids": [1], "bag_lengths": [1]}, Status.INVALID_ARGUMENT, "without pooling"
    ),
    "unknown dtype": ({"table": "item_id", "dtype": 7}, Status.INVALID_ARGUMENT, "dtype: got 7"),
    "unknown policy": ({"table": "item_id", "missing": 7}, Status.INVALID_ARGUMENT, "missing: got 7"),
    "unknown pooling": ({"table": "item_id", "pooling": 7}, Status.INVALID_ARGUMENT, "pooling: got 7"),
    "unknown table": ({"table": "usr", "ids": [1]}, Status.NOT_FOUND, "it has: item_id, user_id"),
    "unknown id": ({"table": "user_id", "ids": [1, 99], "missing": pb.ERROR}, Status.NOT_FOUND, "99"),
    "too many ids": ({"table": "item_id", "ids": range(301)}, Status.RESOURCE_EXHAUSTED, "301, want at most 300"),
    "too many strings": ({"table": "item_id", "string_ids": ["a"] * 301}, Status.RESOURCE_EXHAUSTED, "at most 300"),
    "too many bags": (
        {"table": "item_id", "bag_lengths": [0] * 301, "pooling": pb.SUM}, Status.RESOURCE_EXHAUSTED, "at most 300"
    ),
    "too many bytes": ({"table": "x" * 5000}, Status.RESOURCE_EXHAUSTED, "larger than max"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "said"), ERRORS.values(), ids=ERRORS)
def test_lookup_error_is_the_contracts(lookup, make_engine, fields, status, said):
    engine = make_engine(max_ids=300, max_body_bytes=4000)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        lookup(engine, **fields)
    assert error.value.code() == status
    assert said in error.value.details()
    assert engine.num_in_flight == 0


STRING_ERRORS = {
    "integers": ({"ids": [7]}, Status.INVALID_ARGUMENT, "got integers, table 'name' wants strings"),
    "both": ({"ids": [7], "string_ids": ["a"]}, Status.INVALID_ARGUMENT, "got both"),
    # Details travel in a header of at most some KiB: a long id must not take their place.
    "unknown": ({"string_ids": ["a", "é\n\0" + "x" * 100_000], "missing": pb.ERROR}, Status.NOT_FOUND, r"'é\n\x00xxx"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "said"), STRING_ERRORS.values(), ids=STRING_ERRORS)
def test_lookup_of_strings_fails_as_the_contract_says(lookup, make_engine, string_store, fields, status, said):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        lookup(make_engine(store=string_store), table="name", **fields)
    assert error.value.code() == status
    assert said in error.value.details()


def test_batch_lookup_limits_the_ids_of_all_requests_together(talk, make_engine):
    batch = pb.BatchLookupRequest(requests=[pb.LookupRequest(table="item_id", ids=range(200))] * 2)
    with pytest.raises(grpc.aio.AioRpcError, match="ids: got 400, want at most 300") as error:
        talk(lambda channel: pb_grpc.EmbeddingServiceStub(channel).BatchLookup(batch), make_engine(max_ids=300))
    assert error.value.code() == Status.RESOURCE_EXHAUSTED


def asked_of_users(num_ids):
    return pb.LookupRequest(table="user_id", ids=[1] * num_ids)


WORK = {  # a message, and whether it may be answered on the event loop: 4 KB of it may be 4,000 ids, or 400 requests
    "few ids": ("Lookup", asked_of_users(50), True),
    "many ids": ("Lookup", asked_of_users(4000), False),
    "many ids in bags": (
        "Lookup", pb.LookupRequest(table="user_id", ids=[1] * 4000, pooling=pb.SUM, bag_lengths=[4000]), False,
    ),
    "few ids of several": ("BatchLookup", pb.BatchLookupRequest(requests=[asked_of_users(10)] * 5), True),
    "many requests": ("BatchLookup", pb.BatchLookupRequest(requests=[asked_of_users(1)] * 400), False),
    "many ids of several": ("BatchLookup", pb.BatchLookupRequest(requests=[asked_of_users(2000)] * 2), False),
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
def test_what_a_message_asks_for_decides_where_it_is_answered(talk, make_engine, monkeypatch, name):
    method, message, is_small = WORK[name]
    engine, threads = make_engine(), set()
    looked_up = engine.metrics.looked_up
    monkeypatch.setattr(
        engine.metrics, "looked_up", lambda *found: (threads.add(threading.current_thread()), looked_up(*found))
    )
    talk(lambda channel: getattr(pb_grpc.EmbeddingServiceStub(channel), method)(message), engine)
    assert (threads == {threading.main_thread()}) == is_small


def test_a_batch_of_no_requests_has_no_replies(talk):
    reply = talk(lambda channel: pb_grpc.EmbeddingServiceStub(channel).BatchLookup(pb.BatchLookupRequest()))
    assert list(reply.replies) == []


def test_lookup_is_refused_when_as_many_are_in_flight_as_allowed(lookup, make_engine):
    engine = make_engine(max_in_flight=1)
    with engine.slot(), pytest.raises(grpc.aio.AioRpcError, match="in flight") as error:
        lookup(engine, table="item_id", ids=[1])
    assert error.value.code() == Status.RESOURCE_EXHAUSTED


def test_lookup_is_unavailable_until_the_engine_has_started(lookup, make_engine):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        lookup(make_engine(started=False), table="item_id", ids=[1])
    assert error.value.code() == Status.UNAVAILABLE


def test_lookup_hides_and_logs_what_nobody_expected(lookup, make_engine, monkeypatch, caplog):
    engine = make_engine()
    monkeypatch.setattr(engine, "lookup", lambda requests: 1 / 0)
    with caplog.at_level(logging.ERROR, "service.grpc"), pytest.raises(grpc.aio.AioRpcError) as error:
        lookup(engine, table="item_id", ids=[1])
    assert (error.value.code(), "division" in error.value.details()) == (Status.INTERNAL, False)
    assert "ZeroDivisionError" in caplog.text


PROCEDURES = {
    "Lookup": pb.LookupRequest(table="user_id", ids=[1]),
    "BatchLookup": pb.BatchLookupRequest(),
    "ListTables": pb.ListTablesRequest(),
}


@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer wrong"),), (("authorization", "secret"),)])
def test_every_procedure_refuses_another_key(talk, make_engine, procedure, metadata):
    async def use(channel):
        stub = pb_grpc.EmbeddingServiceStub(channel)
        return await getattr(stub, procedure)(PROCEDURES[procedure], metadata=metadata)

    with pytest.raises(grpc.aio.AioRpcError) as error:
        talk(use, make_engine(api_key="secret"))
    assert error.value.code() == Status.UNAUTHENTICATED


@pytest.mark.parametrize("metadata", [(("authorization", "Bearer secret"),), (("x-api-key", "secret"),)])
def test_lookup_takes_the_key_in_either_form(talk, make_engine, metadata):
    async def use(channel):
        return await pb_grpc.EmbeddingServiceStub(channel).Lookup(PROCEDURES["Lookup"], metadata=metadata)

    assert talk(use, make_engine(api_key="secret")).dim == 1


# Health, reflection, metrics, limits


def test_health_needs_no_key_and_follows_the_server(make_engine):
    async def scenario():
        server = GrpcServer(make_engine(api_key="secret"))
        port = await server.start("127.0.0.1:0")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            async def both():
                replies = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICE)]
                return {reply.status for reply in replies}

            seen = [await both()]
            await server.serve()
            seen.append(await both())
            await server.drain()
            seen.append(await both())
        await server.stop(0)
        return seen

    reply = health_pb2.HealthCheckResponse
    assert asyncio.run(scenario()) == [{reply.NOT_SERVING}, {reply.SERVING}, {reply.NOT_SERVING}]


def test_stop_does_not_wait_for_a_caller_that_watches_health(make_engine):
    async def scenario():
        server = GrpcServer(make_engine())
        port = await server.start("127.0.0.1:0")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            await watch.read()
            started = asyncio.get_running_loop().time()
            await server.stop(20)
            return asyncio.get_running_loop().time() - started

    assert asyncio.run(scenario()) < 5


def test_reflection_lists_the_service_and_holds_its_contract(talk):
    async def use(channel):
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
        ]
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        return [reply async for reply in stub.ServerReflectionInfo(iter(requests))]

    listed, described = talk(use)
    assert {SERVICE, "grpc.health.v1.Health"} <= {s.name for s in listed.list_services_response.service}
    assert pb.DESCRIPTOR.serialized_pb in described.file_descriptor_response.file_descriptor_proto


def test_metrics_count_calls_by_procedure_and_status(lookup, make_engine):
    engine = make_engine()
    lookup(engine, table="user_id", ids=[1, 99])
    with pytest.raises(grpc.aio.AioRpcError):
        lookup(engine, table="usr")
    lines = set(engine.metrics.render().decode().splitlines())
    assert {
        'dpq_requests_total{api="grpc",code="OK",method="Lookup"} 1.0',
        'dpq_requests_total{api="grpc",code="NOT_FOUND",method="Lookup"} 1.0',
        'dpq_ids_total{table="user_id"} 2.0',
        'dpq_missing_ids_total{table="user_id"} 1.0',
    } <= lines


@pytest.mark.parametrize("split", [1, 10_000])
def test_the_largest_reply_that_is_allowed_fits_the_server(make_engine, split):
    """With a send limit of exactly the bytes that the server computed for itself."""
    engine = make_engine(max_ids=10_000)

    async def scenario():
        server = GrpcServer(engine)
        port = await server.start("127.0.0.1:0")
        request = pb.LookupRequest(table="item_id", ids=[10**15] * (10_000 // split))
        unlimited = [("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=unlimited) as channel:
            stub = pb_grpc.EmbeddingServiceStub(channel)
            reply = await stub.BatchLookup(pb.BatchLookupRequest(requests=[request] * split))
        await server.stop(0)
        return sum(len(r.missing) for r in reply.replies), sum(len(r.vectors) for r in reply.replies)

    # Numbers, not the reply: should an assertion fail, pytest would write megabytes.
    num_missing, num_bytes = asyncio.run(scenario())
    assert (num_missing, num_bytes) == (10_000, 10_000 * 24 * 4)
