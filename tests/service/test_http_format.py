import numpy as np
import orjson
import pytest

from dpq_rec import Lookup
from service.errors import InvalidRequestError, MalformedError, NotAcceptableError, UnsupportedMediaTypeError
from service.http_format import (
    JSON,
    OCTETS,
    body_type,
    ids_from_json,
    ids_from_octets,
    lookup_to_octets,
    reply_type,
    tables_from_json,
)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("application/json", JSON),
        ("APPLICATION/JSON; charset=utf-8", JSON),
        ("application/octet-stream", OCTETS),
        ("text/html, application/octet-stream", OCTETS),
        ("application/json;q=0.5, application/octet-stream", OCTETS),
        ("application/json; q=0, */*", OCTETS),
        ("application/octet-stream;q=0.2, */*;q=0.1", OCTETS),
        ("application/octet-stream, application/json", JSON),
    ],
)
def test_reply_type_follows_accept(accept, chosen):
    assert reply_type(accept) == chosen


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
        reply_type(accept)


def test_body_type_ignores_parameters_and_case():
    assert body_type("Application/JSON; charset=utf-8") == JSON


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"]
)
def test_body_type_refuses_other_types(content_type):
    with pytest.raises(UnsupportedMediaTypeError, match="Content-Type: got"):
        body_type(content_type)


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


def test_ids_from_octets_reads_little_endian():
    assert ids_from_octets(bytes([1, 0, 0, 0, 0, 0, 0, 0]) + b"\xff" * 8).tolist() == [1, -1]
    assert ids_from_octets(b"").tolist() == []


def test_ids_from_octets_refuses_a_broken_id():
    with pytest.raises(MalformedError, match="got 9 bytes, want a multiple of 8"):
        ids_from_octets(b"123456789")


def test_lookup_to_octets_has_the_bytes_and_headers_of_the_contract():
    body, headers = lookup_to_octets("v", Lookup(np.array([[1.0], [0.0]], np.float16), np.array([1], np.uint32)))
    assert body == bytes([0x00, 0x3C, 0, 0, 1, 0, 0, 0])
    wanted = {"X-Num-Rows": "2", "X-Dim": "1", "X-Dtype": "float16", "X-Num-Missing": "1", "X-Version": "v"}
    assert headers == wanted
