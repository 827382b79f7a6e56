"""Replies in JSON are what orjson writes of the reference's vectors, byte for byte, however they are written."""

import numpy as np
import orjson
import pytest

from dpq_rec import CodeLayout, EmbeddingStore, Lookup, write_artifact
from dpq_rec.kernels.lookup import JsonTexts
from service import http_bodies
from service.http_bodies import lookup_to_json, lookups_to_json
from service.messages import TableRequest
from tests.dpq_rec.builders import dpq_contents
from tests.service.http_requests import BINARY, ITEMS, id_bytes

UNKNOWN = 10**15


def written(table, version, lookup):
    """A reply as one would write it first."""
    vectors, missing = lookup
    fields = {"table": table, "version": version, "dim": vectors.shape[1], "vectors": vectors, "missing": list(missing)}
    return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)


def some_ids(references, table, num_ids):
    ids = np.resize(references[table].ids, num_ids)
    ids[1::3] = UNKNOWN
    return ids


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 40_000)])
def test_lookup_to_json_equals_orjson(dtype, shape):
    lookup = Lookup(np.random.default_rng(1).standard_normal(shape).astype(dtype), np.array([2, 7], np.uint32))
    assert lookup_to_json('t"', "v", lookup) == written('t"', "v", Lookup(lookup.vectors, [2, 7]))


@pytest.mark.parametrize("missing", ["zeros", "error"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("table", ["item_id", "user_id"])  # codes, dense
@pytest.mark.parametrize("num_ids", [1, 2, 400])
def test_lookup_gives_the_bytes_of_orjson(call, references, table, dtype, missing, num_ids):
    ids = some_ids(references, table, num_ids)
    ids = ids[ids != UNKNOWN] if missing == "error" else ids
    path = f"/v1/tables/{table}/lookup?dtype={dtype}&missing={missing}"
    for sent in ({"json": {"ids": ids.tolist()}}, {"content": id_bytes(ids), "headers": {"Content-Type": BINARY}}):
        answer = call("POST", path, **sent)
        assert answer.content == written(table, "test-1", references[table].lookup(ids, dtype))


def test_lookup_of_no_ids_gives_the_bytes_of_orjson(call):
    answer = call("POST", ITEMS, json={"ids": []})
    assert answer.content == written("item_id", "test-1", Lookup(np.empty((0, 24), np.float32), []))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_lookup_tables_gives_the_bytes_of_orjson(call, references, dtype):
    ids_of = {table: some_ids(references, table, 5) for table in ("user_id", "item_id")}
    body = {"tables": {table: {"ids": ids.tolist()} for table, ids in ids_of.items()}}
    answer = call("POST", f"/v1/lookup?dtype={dtype}", json=body)
    replies = {table: written(table, "test-1", references[table].lookup(ids, dtype)) for table, ids in ids_of.items()}
    wanted = {"version": "test-1", "tables": {table: orjson.Fragment(reply) for table, reply in replies.items()}}
    assert answer.content == orjson.dumps(wanted)


@pytest.mark.parametrize("path", [ITEMS, "/v1/lookup"])
def test_lookup_of_unknown_ids_is_refused_if_so_asked(call, references, path):
    lookup = {"ids": [int(references["item_id"].ids[0]), UNKNOWN]}
    answer = call("POST", f"{path}?missing=error", json=lookup if path == ITEMS else {"tables": {"item_id": lookup}})
    assert (answer.status_code, answer.json()["error_type"]) == (404, "unknown_ids")


@pytest.fixture
def count_texts(monkeypatch):
    """The types that texts are written in, in order."""
    counted = []
    write = JsonTexts.of

    def count(stored, dtype, *others):
        counted.append(dtype)
        return write(stored, dtype, *others)

    monkeypatch.setattr(JsonTexts, "of", count)
    return counted


@pytest.mark.parametrize(
    ("layout", "shared", "wanted"),
    [
        (CodeLayout(num_subspaces=3, num_codes=5), False, ["float32", "float16"]),
        (CodeLayout(num_subspaces=3, num_codes=5), True, ["float32", "float16"]),
        (CodeLayout(num_subspaces=3, num_codes=5, num_levels=2), True, []),  # 20 values
        (CodeLayout(num_subspaces=3, num_codes=6), False, []),  # 36 values
    ],
)
def test_texts_are_written_once_where_vectors_are_made_of_few(
    make_engine, tmp_path, monkeypatch, count_texts, layout, shared, wanted
):
    monkeypatch.setattr(http_bodies, "_MOST_TEXT_VALUES", 30)
    contents = {"t": dpq_contents(9, layout, subspace_dim=2, shared=shared)}
    store = EmbeddingStore.open(write_artifact(tmp_path / "artifact", contents, version="v"))
    engine = make_engine(store=store)
    for dtype in ("float32", "float16", "float32"):
        (reply,) = lookups_to_json(engine, [TableRequest("t", np.array([8, 9, 0]), dtype)])
        assert reply == written("t", "v", Lookup(store.lookup("t", [8, 9, 0], dtype=dtype).vectors, [1]))
    assert count_texts == wanted
