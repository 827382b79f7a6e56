"""Search over HTTP and gRPC held to brute force on the reference's vectors."""

from itertools import chain

import grpc
import grpc.aio
import numpy as np
import pytest

from dpq_rec import EmbeddingStore, Int64Vocabulary, TableContents, write_artifact
from service import http_schema
from service.proto.dpq.v1 import embedding_pb2 as pb
from service.proto.dpq.v1 import embedding_pb2_grpc as pb_grpc
from tests.dpq_rec.builders import dense_contents, write_unchecked
from tests.service.conftest import NAMES
from tests.service.http_requests import BINARY, JSON

ITEMS, STRINGS = "/v1/tables/item_id/search", "/v1/tables/name/search"


@pytest.fixture
def search(talk):
    """search(engine=None, **fields of SearchRequest): the reply, over a real channel, or an AioRpcError."""

    def send(engine=None, **fields):
        return talk(lambda channel: pb_grpc.EmbeddingServiceStub(channel).Search(pb.SearchRequest(**fields)), engine)

    return send


def similarities(reference, query_E, similarity):
    """id -> similarity, in fp64."""
    vectors_VE, query_E = reference.vectors.astype(np.float64), np.asarray(query_E, np.float64)
    scores_V = vectors_VE @ query_E
    if similarity == "cosine":
        scores_V = scores_V / np.linalg.norm(vectors_VE, axis=1) / np.linalg.norm(query_E)
    return dict(zip(reference.ids.tolist(), scores_V.tolist(), strict=True))


def assert_best(ids_T, scores_T, reference, query_E, similarity="dot"):
    expected = similarities(reference, query_E, similarity)
    np.testing.assert_allclose(scores_T, [expected[an_id] for an_id in ids_T], atol=1e-5)
    np.testing.assert_allclose(scores_T, sorted(expected.values(), reverse=True)[: len(ids_T)], atol=1e-5)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_http_finds_the_best_of_queries(call, references, similarity):
    queries_QE = np.random.default_rng(0).standard_normal((3, 24))
    answer = call("POST", ITEMS, json={"queries": queries_QE.tolist(), "k": 7, "similarity": similarity})
    assert (answer.status_code, answer.headers["content-type"]) == (200, JSON)
    found = answer.json()
    http_schema.SearchReply.model_validate(found)
    assert (found["table"], found["version"], found["missing"]) == ("item_id", "test-1", [])
    assert [len(ids_T) for ids_T in found["ids"]] == [7, 7, 7]
    for ids_T, scores_T, query_E in zip(found["ids"], found["scores"], queries_QE, strict=True):
        assert_best(ids_T, scores_T, references["item_id"], query_E, similarity)


def test_http_finds_the_best_of_ids_and_reports_unknown_ones(call, references):
    reference = references["item_id"]
    ids = [10**15, *reference.ids[:2].tolist(), -(10**15)]
    found = call("POST", ITEMS, json={"ids": ids}).json()
    assert found["missing"] == [0, 3]
    assert [len(ids_T) for ids_T in found["ids"]] == [len(scores_T) for scores_T in found["scores"]] == [0, 10, 10, 0]
    for row, (ids_T, scores_T) in enumerate(zip(found["ids"][1:3], found["scores"][1:3], strict=True)):
        assert_best(ids_T, scores_T, reference, reference.vectors[row])
    refused = call("POST", f"{ITEMS}?missing=error", json={"ids": ids})
    assert (refused.status_code, refused.json()["error_type"]) == (404, "unknown_ids")


def test_grpc_finds_what_http_finds(call, search, references):
    queries_QE = np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32)
    for fields, body in (
        ({"queries": queries_QE.ravel().tolist()}, {"queries": queries_QE.tolist()}),
        ({"ids": [10**15, *references["item_id"].ids[:2].tolist()]},) * 2,
        ({"queries": queries_QE.ravel().tolist(), "k": 3, "similarity": pb.COSINE},
         {"queries": queries_QE.tolist(), "k": 3, "similarity": "cosine"}),
    ):  # fmt: skip
        reply, found = search(table="item_id", **fields), call("POST", ITEMS, json=body).json()
        assert (reply.version, list(reply.missing)) == (found["version"], found["missing"])
        assert [list(each.ids) for each in reply.neighbours] == found["ids"]
        got = [list(each.scores) for each in reply.neighbours]
        np.testing.assert_allclose(list(chain(*got)), list(chain(*found["scores"])), rtol=1e-6)


def test_string_ids_are_found_by_both(call, search, make_engine, string_store):
    engine = make_engine(store=string_store)
    some = list(NAMES)[:2]
    found = call("POST", STRINGS, json={"ids": some, "k": 3}, engine=engine).json()
    reply = search(engine, table="name", string_ids=some, k=3)
    assert [list(each.string_ids) for each in reply.neighbours] == found["ids"]
    assert all(isinstance(an_id, str) for ids_T in found["ids"] for an_id in ids_T)


def test_http_gives_ids_as_strings_where_asked(call, make_engine, tmp_path):
    ids = [(1 << 53) + 1, -(1 << 63), (1 << 63) - 1]
    contents = TableContents(
        num_embeddings=3,
        embedding_dim=1,
        vocabulary=Int64Vocabulary.from_ids(np.array(ids)),
        chunks=[np.array([[3], [2], [1]], np.float32)],
    )
    engine = make_engine(store=EmbeddingStore.open(write_artifact(tmp_path / "a", {"item_id": contents})))
    body = {"ids": [ids[0], 7], "k": 3}
    as_strings = call("POST", f"{ITEMS}?ids=string", engine, json=body).json()
    http_schema.SearchReply.model_validate(as_strings)
    as_numbers = call("POST", f"{ITEMS}?ids=number", engine, json=body).json()
    assert as_numbers == call("POST", ITEMS, engine, json=body).json()
    assert as_numbers == {**as_strings, "ids": [ids, []]}
    assert as_strings["ids"] == [[str(an_id) for an_id in ids], []]


def test_http_gives_string_ids_as_they_are_whatever_is_asked(call, make_engine, string_store):
    engine = make_engine(store=string_store)
    found = [call("POST", f"{STRINGS}?ids={kind}", engine, json={"ids": ["a"]}).json() for kind in ("number", "string")]
    assert found[0] == found[1]


def test_the_documentation_says_which_ids_are_rounded_and_asks_for_strings_itself(call):
    search = call("GET", "/openapi.json").json()["paths"]["/v1/tables/{table}/search"]["post"]
    (ids,) = (parameter for parameter in search["parameters"] if parameter["name"] == "ids")
    assert "2^53" in ids["description"]
    assert [example["value"] for example in ids["examples"].values()] == ["string"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 422, "queries, ids: got both or neither"),
        ({"queries": [[0.0] * 24], "ids": [1]}, 422, "queries, ids: got both or neither"),
        ({"queries": [[0.0] * 23]}, 422, r"queries: got shape (1, 23), want [Q, 24]"),
        ({"queries": [[0.0] * 24, [1.0]]}, 422, "queries: got something else than numbers, or rows of several widths"),
        ({"queries": [["1"] * 24]}, 422, "queries: got something else than numbers in a vector"),
        ({"queries": [[True] * 24]}, 422, "queries: got something else than numbers in a vector"),
        ({"queries": [[3e38] * 24]}, 422, "queries: their scores are more than 32 bits hold"),
        ({"queries": [[1e39] * 24]}, 422, "queries: got NaN or infinity"),
        ({"queries": {}}, 422, "queries: want a list of vectors"),
        ({"ids": [1], "k": 0}, 422, "k: got 0, want 1 or more"),
        ({"ids": [1], "k": True}, 422, "k: got a boolean, want an integer"),
        ({"ids": [1], "similarity": "l2"}, 422, "similarity: got 'l2', want dot or cosine"),
        ({"ids": [1], "top": 3}, 422, "body: got 'top', want some of queries, ids, k, similarity"),
        ({"ids": ["a"]}, 422, "ids: got strings, table 'item_id' wants integers"),
        ([], 422, "body: got a list, want an object"),
        ({"ids": [1] * 65}, 413, "queries: got 65, want at most 64 in a request"),
        ({"ids": [1] * 2, "k": 40_000}, 413, "answers: got 80000, want at most 65536"),
    ],
)
def test_http_refuses_what_makes_no_sense(call, body, status, message):
    answer = call("POST", ITEMS, json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]


def test_http_refuses_other_bodies_replies_and_tables(call):
    assert call("POST", ITEMS, content=b"{", headers={"Content-Type": JSON}).status_code == 400
    assert call("POST", ITEMS, content=bytes(8), headers={"Content-Type": BINARY}).status_code == 415
    assert call("POST", ITEMS, json={"ids": [1]}, headers={"Accept": BINARY}).status_code == 406
    assert call("POST", "/v1/tables/other/search", json={"ids": [1]}).status_code == 404


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"table": "item_id"}, "INVALID_ARGUMENT"),
        ({"table": "item_id", "queries": [1.0] * 25}, "INVALID_ARGUMENT"),
        ({"table": "item_id", "ids": [1], "string_ids": ["a"]}, "INVALID_ARGUMENT"),
        ({"table": "item_id", "string_ids": ["a"]}, "INVALID_ARGUMENT"),
        ({"table": "item_id", "ids": [1], "similarity": 7}, "INVALID_ARGUMENT"),
        ({"table": "other", "ids": [1]}, "NOT_FOUND"),
        ({"table": "item_id", "ids": [10**15], "missing": pb.ERROR}, "NOT_FOUND"),
        ({"table": "item_id", "ids": [1] * 65}, "RESOURCE_EXHAUSTED"),
    ],
)
def test_grpc_refuses_what_makes_no_sense(search, fields, code):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        search(**fields)
    assert error.value.code().name == code


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_table_that_holds_nan_is_named_and_not_the_queries(call, search, make_engine, tmp_path, similarity):
    vectors_VE = np.ones((3, 2), np.float32)
    vectors_VE[1, 0] = np.nan
    broken = EmbeddingStore.open(write_unchecked(tmp_path / "broken", {"item_id": dense_contents(vectors_VE)}))
    engine, says = make_engine(store=broken), "table 'item_id': vectors[1, 0] is nan"
    answer = call("POST", ITEMS, engine, json={"queries": [[1, 2]], "similarity": similarity})
    assert (answer.status_code, answer.json()["error_type"]) == (500, "internal")
    assert says in answer.json()["error"]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        search(engine, table="item_id", queries=[1, 2], similarity=pb.COSINE if similarity == "cosine" else pb.DOT)
    assert error.value.code() == grpc.StatusCode.INTERNAL
    assert says in error.value.details()
    assert call("POST", "/v1/tables/item_id/lookup", engine, json={"ids": [0, 2]}).json()["vectors"] == [[1, 1], [1, 1]]
