"""Forms of replies beside JSON and vectors as bytes: codes with their values, Arrow, bags; against EmbeddingStore."""

import re
import sys

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpq_rec import CodeLayout, EmbeddingStore, IdentityVocabulary, TableContents, pack_codes, write_artifact
from dpq_rec.codes import cut_into_tiers
from dpq_rec.wire import PackedRows, Values
from tests.service.http_requests import ARROW, BINARY, CODES, ITEMS, JSON, NAMES, USERS, id_bytes

TIERED = "/v1/tables/tiered/lookup"


@pytest.fixture(scope="module")
def tiered_store(tmp_path_factory):
    """The table `tiered`: 30 rows of 4 levels of 3 bits, then 2 levels, then 1."""
    rng, layout = np.random.default_rng(3), CodeLayout(num_subspaces=2, num_codes=7, num_levels=4)
    tiers = cut_into_tiers(layout, 30, ((0.2, 2), (0.6, 1)))
    chunks = [pack_codes(rng.integers(0, 7, (tier.num_rows, tier.layout.codes_per_row)), tier.layout) for tier in tiers]
    contents = TableContents(
        num_embeddings=30,
        embedding_dim=6,
        vocabulary=IdentityVocabulary(30),
        chunks=chunks,
        layout=layout,
        tiers=tiers,
        values=rng.standard_normal((8, 7, 3)).astype(np.float16),
    )
    return EmbeddingStore.open(write_artifact(tmp_path_factory.mktemp("tiers") / "artifact", {"tiered": contents}))


def rows_of(answer):
    """What a reply of codes holds, by its headers alone."""
    num_rows, row_bytes, num_missing = (
        int(answer.headers[f"X-{name}"]) for name in ("Num-Rows", "Row-Bytes", "Num-Missing")
    )
    at = num_rows * row_bytes
    packed_NW = np.frombuffer(answer.content, np.uint8, at).reshape(num_rows, row_bytes)
    missing = np.frombuffer(answer.content, "<u4", num_missing, at)
    tiers_N = np.frombuffer(answer.content, np.uint8, offset=at + 4 * num_missing)
    return PackedRows(packed_NW, missing, tiers_N if len(tiers_N) else None)


# Codes


@pytest.mark.parametrize("table", ["item_id", "tiered"])
@pytest.mark.parametrize("num_unknown", [0, 3])
def test_codes_and_values_give_the_vectors_of_the_store(call, make_engine, store, tiered_store, table, num_unknown):
    store = store if table == "item_id" else tiered_store
    known = store.tables[table].vocabulary.ids_of_rows(0, 30)[0]
    ids = np.concatenate([known[::-1], np.full(num_unknown, -(10**15)), known[:2]])
    engine = make_engine(store=store)
    headers = {"Content-Type": BINARY, "Accept": CODES}
    answer = call("POST", f"/v1/tables/{table}/lookup", engine, content=id_bytes(ids), headers=headers)
    values = call("GET", f"/v1/tables/{table}/values", engine)
    assert (answer.status_code, answer.headers["content-type"], values.status_code) == (200, CODES, 200)
    assert answer.headers["X-Version"] == values.headers["X-Version"] == store.version
    rows, wanted = rows_of(answer), store.lookup(table, ids)
    assert Values.from_bytes(values.content).decode(rows).tobytes() == wanted.vectors.tobytes()
    assert rows.missing.tolist() == wanted.missing.tolist()
    assert len(answer.content) == len(ids) * (rows.packed_NW.shape[1] + (table == "tiered")) + 4 * num_unknown


def test_codes_of_no_ids_are_no_bytes(call):
    answer = call("POST", ITEMS, json={"ids": []}, headers={"Accept": CODES})
    assert (answer.content, answer.headers["X-Num-Rows"], answer.headers["X-Row-Bytes"]) == (b"", "0", "3")


def test_values_are_a_safetensors_file_of_what_the_artifact_holds(call, make_engine, tiered_store):
    content = call("GET", "/v1/tables/tiered/values", make_engine(store=tiered_store)).content
    found = safetensors.numpy.load(content)
    np.testing.assert_array_equal(found["values"], tiered_store.tables["tiered"].tensors["values"])
    assert found["values"].dtype == np.float16
    assert b'"num_levels":"[4, 2, 1]"' in content
    assert b'"code_bits":"3"' in content


# Arrow


def read(answer):
    with pa.ipc.open_stream(answer.content) as stream:
        return stream.read_all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrow_has_a_column_of_ids_and_one_of_vectors_with_null_for_unknown_ids(call, store, dtype, references):
    ids = [*references["item_id"].ids[:4].tolist(), 10**15]
    headers = {"Content-Type": BINARY, "Accept": ARROW}
    answer = call("POST", f"{ITEMS}?dtype={dtype}", content=id_bytes(ids), headers=headers)
    table = read(answer)
    element = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    assert table.schema.equals(pa.schema([("id", pa.int64()), ("vector", pa.list_(element, 24))]))
    assert table.schema.metadata == {b"table": b"item_id", b"version": b"test-1"}
    assert table["id"].to_pylist() == ids
    vectors = table["vector"].combine_chunks()
    assert vectors.is_null().to_pylist() == [False] * 4 + [True]
    found = vectors[:4].flatten().to_numpy(zero_copy_only=False)
    assert found.tobytes() == store.lookup("item_id", ids[:4], dtype=dtype).vectors.tobytes()
    assert (answer.headers["X-Num-Rows"], answer.headers["X-Num-Missing"]) == ("5", "1")


def test_arrow_of_strings_and_of_no_ids(call, make_engine, string_store):
    engine = make_engine(store=string_store)
    table = read(call("POST", NAMES, engine, json={"ids": ["ü", "b", ""]}, headers={"Accept": ARROW}))
    assert table.to_pydict() == {"id": ["ü", "b", ""], "vector": [[2, -1], None, [3, -2]]}
    empty = read(call("POST", NAMES, engine, json={"ids": []}, headers={"Accept": ARROW}))
    assert (empty.num_rows, empty.schema) == (0, table.schema)


def test_arrow_without_pyarrow_is_refused_and_what_is_missing_is_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    answer = call("POST", ITEMS, json={"ids": [1]}, headers={"Accept": ARROW})
    assert (answer.status_code, answer.json()["error_type"]) == (406, "not_acceptable")
    assert "pip install 'dpq-rec[arrow]'" in answer.json()["error"]


# Bags


def pooled(store, table, ids, lengths, pooling):
    """The reference: a loop."""
    vectors, missing = store.lookup(table, ids)
    wanted, start = [], 0
    for length in lengths:
        present = [at for at in range(start, start + length) if at not in set(missing.tolist())]
        total = np.zeros(vectors.shape[1], np.float32)
        for at in present:
            total = total + vectors[at]
        wanted.append(total / np.float32(len(present)) if present and pooling == "mean" else total)
        start += length
    return np.array(wanted, np.float32).reshape(len(lengths), vectors.shape[1]), missing.tolist()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 5), max_size=6),
    pooling=st.sampled_from(["sum", "mean"]),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 99),
)
def test_bags_are_pooled_in_every_form_as_a_loop_pools_them(call, store, references, lengths, pooling, dtype, seed):
    known = references["item_id"].ids
    ids = np.random.default_rng(seed).choice(np.concatenate([known[:20], [10**15]]), sum(lengths))
    wanted, missing = pooled(store, "item_id", ids, lengths, pooling)
    path = f"{ITEMS}?pooling={pooling}&dtype={dtype}"
    bags = {"ids": ids.tolist(), "bag_lengths": lengths}
    as_json = call("POST", path, json=bags).json()
    found = np.array(as_json["vectors"], np.float64).astype(dtype).reshape(wanted.shape)
    assert (found.tobytes(), as_json["missing"]) == (wanted.astype(dtype).tobytes(), missing)
    content = id_bytes(ids) + np.array(lengths, "<u4").tobytes()
    headers = {"Content-Type": BINARY, "Accept": BINARY}
    as_bytes = call("POST", f"{path}&num_bags={len(lengths)}", content=content, headers=headers)
    assert as_bytes.content == wanted.astype(dtype).tobytes() + np.array(missing, "<u4").tobytes()
    assert (as_bytes.headers["X-Num-Rows"], as_bytes.headers["X-Dtype"]) == (str(len(lengths)), dtype)


def test_bags_of_strings_are_pooled(call, make_engine, string_store):
    bags = {"ids": ["ü", "b", "7", "a"], "bag_lengths": [3, 0, 1]}
    found = call("POST", f"{NAMES}?pooling=mean", make_engine(store=string_store), json=bags).json()
    assert (found["vectors"], found["missing"]) == ([[2.5, -1.5], [0, 0], [1, 0]], [1])


# Refusals

BAGS = {"ids": [1, 2], "bag_lengths": [2]}
ERRORS = {
    "codes of a dense table": (
        f"{USERS}", {"json": {"ids": [1]}, "headers": {"Accept": CODES}}, 406, "'user_id' is of kind 'dense'"
    ),
    "codes of bags": (f"{ITEMS}?pooling=sum", {"json": BAGS, "headers": {"Accept": CODES}}, 406, "bags have no"),
    "Arrow of bags": (f"{ITEMS}?pooling=sum", {"json": BAGS, "headers": {"Accept": ARROW}}, 406, "bags have no"),
    "codes with a dtype": (
        f"{ITEMS}?dtype=float16", {"json": {"ids": [1]}, "headers": {"Accept": CODES}}, 422, "dtype: got float16"
    ),
    "codes of strings for integers": (ITEMS, {"json": {"ids": ["a"]}, "headers": {"Accept": CODES}}, 422, "integers"),
    "codes of too many ids": (
        ITEMS, {"json": {"ids": [1] * 301}, "headers": {"Accept": CODES}}, 413, "301, want at most 300"
    ),
    "codes of unknown ids": (
        f"{ITEMS}?missing=error", {"json": {"ids": [10**15]}, "headers": {"Accept": CODES}}, 404, "1000000000000000"
    ),
    "bag lengths without pooling": (ITEMS, {"json": BAGS}, 422, "got 'bag_lengths', want 'ids' alone"),
    "pooling without bag lengths": (f"{ITEMS}?pooling=sum", {"json": {"ids": [1]}}, 422, "got no 'bag_lengths'"),
    "bag lengths that do not sum": (
        f"{ITEMS}?pooling=sum", {"json": {"ids": [1], "bag_lengths": [2]}}, 422, "got a sum of 2, want the 1 ids"
    ),
    "negative bag lengths": (
        f"{ITEMS}?pooling=sum", {"json": {"ids": [1], "bag_lengths": [2, -1]}}, 422, "integers from 0"
    ),
    "bag lengths whose sum wraps around": (
        f"{ITEMS}?pooling=sum", {"json": {"ids": [1], "bag_lengths": [2**63 - 1, 2**63 - 1, 3]}}, 422, "integers from 0"
    ),
    "bag lengths of text": (f"{ITEMS}?pooling=sum", {"json": {"ids": [1], "bag_lengths": ["1"]}}, 422, "integers from"),
    "too many bags": (
        f"{ITEMS}?pooling=sum", {"json": {"ids": [], "bag_lengths": [0] * 301}}, 413, "rows of the reply: got 301"
    ),
    "bytes without num_bags": (
        f"{ITEMS}?pooling=sum", {"content": b"", "headers": {"Content-Type": BINARY}}, 422, "num_bags: got none"
    ),
    "JSON with num_bags": (f"{ITEMS}?pooling=sum&num_bags=1", {"json": BAGS}, 422, "num_bags: got 1"),
    "num_bags without pooling": (
        f"{ITEMS}?num_bags=1", {"content": b"", "headers": {"Content-Type": BINARY}}, 422, "num_bags: got 1"
    ),
    "num_bags that is no count": (
        f"{ITEMS}?pooling=sum&num_bags=-1", {"content": b"", "headers": {"Content-Type": BINARY}}, 422, "num_bags"
    ),
    "too few bytes for the bags": (
        f"{ITEMS}?pooling=sum&num_bags=3", {"content": b"12345678", "headers": {"Content-Type": BINARY}}, 400, "got 8"
    ),
    "another pooling": (f"{ITEMS}?pooling=max", {"json": BAGS}, 422, "pooling: got 'max'"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "sent", "status", "said"), ERRORS.values(), ids=ERRORS)
def test_a_form_that_cannot_be_had_is_refused_with_the_reason(call, make_engine, path, sent, status, said):
    engine = make_engine(max_ids=300)
    answer = call("POST", path, engine, **sent)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]
    assert engine.num_in_flight == 0


def test_a_caller_who_would_rather_have_codes_gets_vectors_of_a_dense_table(call):
    answer = call("POST", USERS, json={"ids": [1]}, headers={"Accept": f"{CODES}, {JSON};q=0.5"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, JSON)


@pytest.mark.parametrize(
    ("table", "status", "said"), [("user_id", 422, "kind 'dense'"), ("usr", 404, "it has: item_id, user_id")]
)
def test_values_of_a_table_without_any_are_refused(call, table, status, said):
    answer = call("GET", f"/v1/tables/{table}/values")
    assert answer.status_code == status
    assert said in answer.json()["error"]


def test_values_and_codes_ask_for_the_key(call, make_engine):
    engine = make_engine(api_key="secret")
    assert call("GET", "/v1/tables/item_id/values", engine).status_code == 401
    assert call("POST", ITEMS, engine, json={"ids": []}, headers={"Accept": CODES}).status_code == 401


def test_documentation_names_every_form(call):
    text = call("GET", "/openapi.json").text
    for words in (CODES, ARROW, "num_bags", "bag_lengths", "X-Row-Bytes", "/v1/tables/{table}/values"):
        assert re.search(re.escape(words), text)
