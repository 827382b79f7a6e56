import numpy as np
import orjson
import pytest
from starlette.datastructures import Headers

from service.errors import InvalidRequestError, MalformedError, NotAcceptableError, UnsupportedMediaTypeError
from service.http_bodies import BINARY, JSON, Reply, ids_from_binary, ids_from_json, tables_from_json, vectors_head
from service.http_lookup import body_type, reply_type


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("application/json", JSON),
        ("APPLICATION/JSON; charset=utf-8", JSON),
        ("application/octet-stream", BINARY),
        ("text/html, application/octet-stream", BINARY),
        ("application/json;q=0.5, application/octet-stream", BINARY),
        ("application/json; q=0, */*", BINARY),
        ("application/octet-stream;q=0.2, */*;q=0.1", BINARY),
        ("application/octet-stream, application/json", JSON),
    ],
)
def test_reply_type_follows_accept(accept, chosen):
    assert reply_type(Headers({"accept": accept})) == chosen


@pytest.mark.parametrize(
    "accept",
    [
        "text/html",
        "application/json;q=0",
        "image/*",
        "*/*;q=x",
        "*/*;q=nan",
        "*/*;q=inf",
        "*/*;q=2",
        "*/*;q=-1",
        "*/*;q",
        "nonsense",
    ],
)
def test_reply_type_refuses_what_is_not_offered(accept):
    with pytest.raises(NotAcceptableError, match="Accept: got"):
        reply_type(Headers({"accept": accept}))


def test_body_type_ignores_parameters_and_case():
    assert body_type(Headers({"content-type": "Application/JSON; charset=utf-8"})) == JSON


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"]
)
def test_body_type_refuses_other_types(content_type):
    with pytest.raises(UnsupportedMediaTypeError, match="Content-Type: got"):
        body_type(Headers({} if content_type is None else {"content-type": content_type}))


@pytest.mark.parametrize("ids", [[], [0], [-(2**63), 2**63 - 1, 5]])
def test_ids_from_json_takes_64_bit_integers(ids):
    parsed = ids_from_json(orjson.dumps({"ids": ids}))
    assert parsed.dtype == np.int64
    assert parsed.tolist() == ids


def test_ids_from_json_takes_strings():
    assert ids_from_json('{"ids": ["a", "ü"]}'.encode()) == ["a", "ü"]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ("[1, true]", r"ids\[1\]: got a boolean"),
        ("[false]", r"ids\[0\]: got a boolean"),
        ("[1.0]", r"ids\[0\]: got a float"),
        ("[1e3]", r"ids\[0\]: got a float"),
        ("[1, null]", r"ids\[1\]: got null"),
        ("[[1]]", r"ids\[0\]: got a list"),
        ("[{}]", r"ids\[0\]: got an object"),
        ('[1, "a"]', r"ids\[1\]: got a string"),
        ('["a", 1]', r"ids\[1\]: got an integer"),
        ("[0, 9223372036854775808]", r"ids\[1\]: got 9223372036854775808, want a 64-bit"),
        ("[18446744073709551616]", r"ids\[0\]: got a float"),
        ("[-9223372036854775809]", r"ids\[0\]: got a float"),
        ("7", "ids: got an integer, want a list"),
        ("null", "ids: got null, want a list"),
        ('{"0": 1}', "ids: got an object, want a list"),
    ],
)
def test_ids_from_json_refuses_other_types(ids, said):
    with pytest.raises(InvalidRequestError, match=said):
        ids_from_json(b'{"ids": %b}' % ids.encode())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{}", "body: got no 'ids'"),
        ("[1]", "body: got a list"),
        ("1", "body: got an integer"),
        ('{"ids": [1], "dtype": "float16"}', "got 'dtype', want 'ids' alone"),
    ],
)
def test_ids_from_json_refuses_other_forms(body, said):
    with pytest.raises(InvalidRequestError, match=said):
        ids_from_json(body.encode())


@pytest.mark.parametrize("body", [b"", b"{", b'{"ids": [1,]}', b'{"ids": [NaN]}', b"\xff", b"ids=1"])
def test_ids_from_json_refuses_what_is_no_json(body):
    with pytest.raises(MalformedError, match="body: got no JSON"):
        ids_from_json(body)


def test_tables_from_json_names_the_table_of_a_wrong_id():
    with pytest.raises(InvalidRequestError, match=r"tables\.b\.ids\[0\]: got a float"):
        tables_from_json(b'{"tables": {"a": {"ids": [1]}, "b": {"ids": [0.5]}}}')


@pytest.mark.parametrize("body", ['{"tables": []}', '{"tables": {"a": [1]}}', '{"tables": {"a": {}}}', "{}"])
def test_tables_from_json_refuses_other_forms(body):
    with pytest.raises(InvalidRequestError):
        tables_from_json(body.encode())


def test_ids_from_binary_reads_little_endian():
    assert ids_from_binary(bytes([1, 0, 0, 0, 0, 0, 0, 0]) + b"\xff" * 8).tolist() == [1, -1]
    assert ids_from_binary(b"").tolist() == []


def test_ids_from_binary_refuses_a_broken_id():
    with pytest.raises(MalformedError, match="got 9 bytes, want a multiple of 8"):
        ids_from_binary(b"123456789")


def test_headers_of_vectors_are_those_of_the_contract():
    lines = vectors_head("v", 2, 1, "float16", 1).decode().splitlines()
    named = ["x-num-rows: 2", "x-dim: 1", "x-dtype: float16", "x-num-missing: 1", "x-version: v"]
    assert lines == [*named, "content-length: 8", "content-type: application/octet-stream", ""]


def test_a_reply_has_the_same_headers_over_asgi():
    response = Reply(b"12345678", vectors_head("v", 2, 1, "float16", 1), 200).response()
    assert response.raw_headers[:2] == [(b"x-num-rows", b"2"), (b"x-dim", b"1")]
    assert response.raw_headers[-1] == (b"content-type", b"application/octet-stream")
    assert (response.body, response.status_code) == (b"12345678", 200)
