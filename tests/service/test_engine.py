import asyncio
import threading

import numpy as np
import pytest

from dpq_rec import ConfigError, IdTypeError, UnknownIdsError, UnknownTableError
from service.engine import TableRequest, largest_reply_bytes
from service.errors import InvalidRequestError, NotReadyError, OverloadedError, TooManyIdsError


def table_request(table="item_id", ids=(), **others):
    return TableRequest(table=table, ids=np.array(ids, np.int64), **others)


def test_engine_lookup_gives_each_table_its_vectors_and_the_version(make_engine, references):
    ids = [*references["item_id"].ids[[3, -1, 3]], 10**12]
    engine = make_engine()
    items, users = engine.lookup([table_request(ids=ids), table_request("user_id", [39, 40])])
    vectors, missing = references["item_id"].lookup(ids)
    np.testing.assert_array_equal(items.vectors, vectors)
    assert (engine.version, items.missing.tolist(), users.missing.tolist()) == ("test-1", missing, [1])


def test_engine_lookup_casts_after_pooling(make_engine, references):
    ids = references["item_id"].ids[:50]
    bags = np.array([50])
    request = table_request(ids=ids, dtype="float16", pooling="sum", bag_lengths_B=bags)
    pooled = np.zeros(24, np.float32)
    for vector in references["item_id"].vectors[:50]:
        pooled += vector
    (found,) = make_engine().lookup([request])
    np.testing.assert_array_equal(found.vectors, pooled.astype(np.float16)[None])


def test_engine_lookup_refuses_an_unknown_table(make_engine):
    with pytest.raises(UnknownTableError, match="it has: item_id, user_id"):
        make_engine().lookup([table_request("usr")])


def test_engine_lookup_refuses_unknown_ids_when_asked_to(make_engine):
    with pytest.raises(UnknownIdsError, match="99"):
        make_engine().lookup([table_request("user_id", [1, 99], missing="error")])


def test_engine_lookup_refuses_strings_before_numpy_sees_them(make_engine):
    ids = ["a" * 3_000_000, *["b"] * 60_000]  # as an array: 720 GB
    with pytest.raises(IdTypeError, match="got strings, table 'item_id' wants integers"):
        make_engine().lookup([TableRequest(table="item_id", ids=ids)])


def test_engine_lookup_takes_as_many_ids_as_allowed_and_no_more(make_engine):
    engine = make_engine(max_ids=4)
    engine.lookup([table_request(ids=[1, 2]), table_request("user_id", [1, 2])])
    with pytest.raises(TooManyIdsError, match="ids: got 5, want at most 4"):
        engine.lookup([table_request(ids=[1, 2]), table_request("user_id", [1, 2, 3])])


def test_engine_lookup_limits_empty_bags(make_engine):
    bags = table_request(pooling="sum", bag_lengths_B=np.zeros(3, np.int64))
    with pytest.raises(TooManyIdsError, match="rows of the reply: got 6, want at most 4"):
        make_engine(max_ids=4).lookup([bags, bags])


def test_engine_lookup_limits_empty_requests(make_engine):
    with pytest.raises(TooManyIdsError, match="requests: got 5, want at most 4"):
        make_engine(max_ids=4).lookup([table_request()] * 5)


@pytest.mark.parametrize(
    "others",
    [{"pooling": "sum"}, {"pooling": "mean", "bag_lengths_B": np.array([1, 2])}, {"bag_lengths_B": np.array([2])}],
)
def test_engine_lookup_refuses_bags_that_do_not_fit(make_engine, others):
    with pytest.raises(InvalidRequestError, match=r"bag_lengths"):
        make_engine().lookup([table_request(ids=[1, 2], **others)])


def test_engine_slot_refuses_one_too_many_and_is_free_afterwards(make_engine):
    engine = make_engine(max_in_flight=2)
    with engine.slot(), engine.slot(), pytest.raises(OverloadedError, match="2 requests are in flight"), engine.slot():
        pass
    with engine.slot():
        assert engine.num_in_flight == 1
    assert engine.num_in_flight == 0


def test_engine_serves_while_it_drains_but_is_not_ready(make_engine):
    engine = make_engine(started=False)
    with pytest.raises(NotReadyError, match="starting"), engine.slot():
        pass
    engine.start()
    engine.check_ready()
    engine.drain()
    with engine.slot(), pytest.raises(NotReadyError, match="draining"):
        engine.check_ready()
    engine.stop()
    with pytest.raises(NotReadyError, match="stopping"), engine.slot():
        pass


@pytest.mark.parametrize(("num_values", "inline"), [(240, True), (65_536, False)])
def test_engine_run_values_keeps_large_requests_off_the_event_loop(make_engine, num_values, inline):
    thread = asyncio.run(make_engine().run_values(threading.current_thread, num_values))
    assert (thread is threading.main_thread()) == inline


def test_engine_list_tables_describes_every_table(make_engine):
    items, users = make_engine().list_tables()
    assert (items.name, items.dim, items.num_embeddings, items.kind) == ("item_id", 24, 500, "dpq")
    assert (items.vocabulary, items.features) == ("int64", ["item", "history"])
    assert items.full_bytes == 500 * 24 * 4
    assert items.artifact_bytes == 500 * 3 + 6 * 5 * 4 * 4
    assert items.compression_ratio == items.full_bytes / items.artifact_bytes
    assert (users.name, users.kind, users.vocabulary, users.compression_ratio) == ("user_id", "dense", "identity", 1.0)


def test_largest_reply_bytes_refuses_what_no_message_can_hold(store):
    assert largest_reply_bytes(store, 65_536) > 65_536 * 24 * 4
    with pytest.raises(ConfigError, match=r"max_ids: got 100000000, want at most \d+"):
        largest_reply_bytes(store, 100_000_000)
