"""The HTTP API in this process: every error of contract 4, but that of a wrong key, and the limits behind them."""

import asyncio
import logging

import httpx
import pytest

from service.http_app import create_app
from tests.service.http_requests import BINARY, ITEMS, JSON, NAMES, USERS, id_bytes

# Method, path, request, status, error_type, what the text says.
ERRORS = {
    "broken JSON": ("POST", ITEMS, {"content": b"{", "headers": {"Content-Type": JSON}}, 400, "malformed", "no JSON"),
    "no body": ("POST", ITEMS, {"headers": {"Content-Type": JSON}}, 400, "malformed", "no JSON"),
    "broken id": (
        "POST", ITEMS, {"content": b"1234567", "headers": {"Content-Type": BINARY}}, 400, "malformed", "multiple of 8"
    ),
    "broken JSON of tables": (
        "POST", "/v1/lookup", {"content": b"[", "headers": {"Content-Type": JSON}}, 400, "malformed", "no JSON"
    ),
    "unknown table": ("POST", "/v1/tables/usr/lookup", {"json": {"ids": [1]}}, 404, "unknown_table", "item_id"),
    "unknown table of several": (
        "POST", "/v1/lookup", {"json": {"tables": {"usr": {"ids": []}}}}, 404, "unknown_table", "usr"
    ),
    "unknown id": ("POST", f"{USERS}?missing=error", {"json": {"ids": [1, 99]}}, 404, "unknown_ids", "99"),
    "unknown id of several": (
        "POST", "/v1/lookup?missing=error", {"json": {"tables": {"user_id": {"ids": [99]}}}}, 404, "unknown_ids", "99"
    ),
    "Accept": (
        "POST", ITEMS, {"json": {"ids": [1]}, "headers": {"Accept": "text/html"}}, 406, "not_acceptable", "text/html"
    ),
    "Accept of several": (
        "POST", "/v1/lookup", {"json": {"tables": {}}, "headers": {"Accept": BINARY}}, 406, "not_acceptable", BINARY
    ),
    "too many ids": ("POST", ITEMS, {"json": {"ids": list(range(301))}}, 413, "too_many_ids", "301, want at most 300"),
    "too many ids as bytes": (
        "POST", ITEMS, {"content": id_bytes(range(301)), "headers": {"Content-Type": BINARY}},
        413, "too_many_ids", "301",
    ),
    "too many ids of several": (
        "POST", "/v1/lookup", {"json": {"tables": {"item_id": {"ids": [1] * 200}, "user_id": {"ids": [1] * 101}}}},
        413, "too_many_ids", "301",
    ),
    "too many bytes": (
        "POST", ITEMS, {"content": b" " * 5001, "headers": {"Content-Type": JSON}}, 413, "too_many_bytes", "5000 bytes"
    ),
    "too many bytes of several": (
        "POST", "/v1/lookup", {"content": b" " * 5001, "headers": {"Content-Type": JSON}}, 413, "too_many_bytes", "5000"
    ),
    "content type": ("POST", ITEMS, {"data": {"ids": "1"}}, 415, "unsupported_media_type", "x-www-form-urlencoded"),
    "gzip": (
        "POST", ITEMS, {"content": bytes(8), "headers": {"Content-Type": BINARY, "Content-Encoding": "gzip"}},
        415, "unsupported_media_type", "got 'gzip', want identity",
    ),
    "gzip of several": (
        "POST", "/v1/lookup", {"json": {"tables": {}}, "headers": {"Content-Encoding": "identity, br"}},
        415, "unsupported_media_type", "got 'br', want identity",
    ),
    "no content type": ("POST", ITEMS, {"content": b"{}"}, 415, "unsupported_media_type", "got none"),
    "bytes for several": (
        "POST", "/v1/lookup", {"content": b"", "headers": {"Content-Type": BINARY}},
        415, "unsupported_media_type", BINARY,
    ),
    "float": ("POST", ITEMS, {"json": {"ids": [1.5]}}, 422, "invalid_request", "ids[0]: got a float"),
    "boolean": ("POST", ITEMS, {"json": {"ids": [1, True]}}, 422, "invalid_request", "ids[1]: got a boolean"),
    "nested": ("POST", ITEMS, {"json": {"ids": [[1]]}}, 422, "invalid_request", "ids[0]: got a list"),
    "beyond int64": ("POST", ITEMS, {"json": {"ids": [1 << 63]}}, 422, "invalid_request", "want a 64-bit integer"),
    "far beyond int64": ("POST", ITEMS, {"json": {"ids": [1 << 70]}}, 422, "invalid_request", "ids[0]: got a float"),
    "strings": ("POST", ITEMS, {"json": {"ids": ["a"]}}, 422, "wrong_id_type", "wants integers"),
    "no ids": ("POST", ITEMS, {"json": {"id": [1]}}, 422, "invalid_request", "got no 'ids'"),
    "no tables": ("POST", "/v1/lookup", {"json": {"ids": [1]}}, 422, "invalid_request", "got no 'tables'"),
    "dtype": ("POST", f"{ITEMS}?dtype=float64", {"json": {"ids": [1]}}, 422, "invalid_request", "dtype: got 'float64'"),
    "missing": ("POST", f"{ITEMS}?missing=skip", {"json": {"ids": [1]}}, 422, "invalid_request", "missing: got 'skip'"),
    "dtype of several": ("POST", "/v1/lookup?dtype=x", {"json": {"tables": {}}}, 422, "invalid_request", "dtype"),
}  # fmt: skip


@pytest.mark.parametrize(("method", "path", "sent", "status", "error_type", "said"), ERRORS.values(), ids=ERRORS)
def test_lookup_error_is_the_contracts_and_is_documented(
    call, make_engine, method, path, sent, status, error_type, said
):
    engine = make_engine(max_ids=300, max_body_bytes=5000)
    answer = call(method, path, engine, **sent)
    assert (answer.status_code, answer.json()["error_type"]) == (status, error_type)
    assert said in answer.json()["error"]
    assert set(answer.json()) == {"error", "error_type"}
    assert engine.num_in_flight == 0
    route = path.partition("?")[0]
    template = route if route == "/v1/lookup" else "/v1/tables/{table}/lookup"
    assert str(status) in create_app(engine).openapi()["paths"][template]["post"]["responses"]


STRING_ERRORS = {
    "bytes": (
        NAMES, {"content": b"12345678", "headers": {"Content-Type": BINARY}}, 415, "unsupported_media_type", "string"
    ),
    "integers": (NAMES, {"json": {"ids": [7]}}, 422, "wrong_id_type", "got integers, table 'name' wants strings"),
    "integers of several": (
        "/v1/lookup", {"json": {"tables": {"name": {"ids": [7]}}}}, 422, "wrong_id_type", "wants strings"
    ),
    "mixed": (NAMES, {"json": {"ids": ["a", 7]}}, 422, "invalid_request", "ids[1]: got an integer"),
    "null": (NAMES, {"json": {"ids": ["a", None]}}, 422, "invalid_request", "ids[1]: got null"),
    "half a surrogate pair": (
        NAMES, {"content": b'{"ids": ["\\ud800"]}', "headers": {"Content-Type": JSON}}, 400, "malformed", "surrogate"
    ),
    "unknown": (f"{NAMES}?missing=error", {"json": {"ids": ["a", "b\n"]}}, 404, "unknown_ids", "table 'name': 'b\\n';"),
    "too many": (NAMES, {"json": {"ids": ["a"] * 301}}, 413, "too_many_ids", "301, want at most 300"),
    "too long": (NAMES, {"json": {"ids": ["a" * 5000]}}, 413, "too_many_bytes", "more than 5000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "sent", "status", "error_type", "said"), STRING_ERRORS.values(), ids=STRING_ERRORS)
def test_lookup_of_strings_fails_as_the_contract_says(
    call, make_engine, string_store, path, sent, status, error_type, said
):
    answer = call("POST", path, make_engine(store=string_store, max_ids=300, max_body_bytes=5000), **sent)
    assert (answer.status_code, answer.json()["error_type"]) == (status, error_type)
    assert said in answer.json()["error"]


LONG = "x" * 50_000
OF_LONG = {
    "field": (USERS, {"json": {"ids": [1], LONG: 1}}, 422),
    "field of a search": ("/v1/tables/user_id/search", {"json": {"ids": [1], LONG: 1}}, 422),
    "similarity": ("/v1/tables/user_id/search", {"json": {"ids": [1], "similarity": LONG}}, 422),
    "table": (f"/v1/tables/{LONG}/lookup", {"json": {"ids": [1]}}, 404),
    "table of several": ("/v1/lookup", {"json": {"tables": {LONG: {"ids": [1]}}}}, 404),
    "route": (f"/{LONG}", {}, 404),
    "value of the query": (f"{USERS}?dtype={LONG}", {"json": {"ids": [1]}}, 422),
    "content type": (USERS, {"content": b"", "headers": {"Content-Type": LONG}}, 415),
    "Accept": (USERS, {"json": {"ids": [1]}, "headers": {"Accept": LONG}}, 406),
}


@pytest.mark.parametrize(("path", "sent", "status"), OF_LONG.values(), ids=OF_LONG)
def test_an_error_repeats_no_more_of_a_request_than_can_be_read(call, path, sent, status):
    answer = call("POST", path, **sent)
    assert answer.status_code == status
    assert len(answer.content) < 3000


def test_lookup_stops_reading_a_body_of_unknown_length_at_the_limit(call, make_engine):
    sent = []

    async def endless():
        while True:
            sent.append(1)
            yield b" " * 1000

    answer = call("POST", ITEMS, make_engine(max_body_bytes=5000), content=endless(), headers={"Content-Type": JSON})
    assert (answer.status_code, answer.json()["error_type"]) == (413, "too_many_bytes")
    assert answer.headers["connection"] == "close"
    assert len(sent) == 6


MORE = {
    "lookup": ("POST", USERS, {"json": {"ids": [1]}}),
    "tables": ("POST", "/v1/lookup", {"json": {"tables": {}}}),
    "search": ("POST", "/v1/tables/user_id/search", {"json": {"ids": [1]}}),
    "values": ("GET", "/v1/tables/item_id/values", {}),
}


@pytest.mark.parametrize("name", MORE)
def test_api_refuses_more_requests_than_may_be_in_flight(call, make_engine, name):
    engine = make_engine(max_in_flight=1)
    with engine.slot():
        answer = call(MORE[name][0], MORE[name][1], engine, **MORE[name][2])
        assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
        assert answer.headers["retry-after"] == "1"
        assert call("GET", "/readyz", engine).status_code == 200
    assert call(MORE[name][0], MORE[name][1], engine, **MORE[name][2]).status_code == 200
    assert engine.num_in_flight == 0


def test_a_slot_is_taken_when_the_body_has_arrived(make_engine):
    engine = make_engine(max_in_flight=1)

    async def scenario():
        arrived, go_on = asyncio.Event(), asyncio.Event()

        async def slow():
            yield b'{"ids": '
            arrived.set()
            await go_on.wait()
            yield b"[1]}"

        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            slow_ones = [client.post(USERS, content=slow(), headers={"Content-Type": JSON}) for _ in range(2)]
            first, second = map(asyncio.create_task, slow_ones)
            await arrived.wait()
            meanwhile = await client.post(USERS, json={"ids": [1]})
            in_flight = engine.metrics.render()
            go_on.set()
            return [meanwhile, await first, await second], in_flight

    answers, in_flight = asyncio.run(scenario())
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert b"dpq_in_flight_requests 2.0" in in_flight
    assert (engine.num_in_flight, engine.num_bytes_arriving) == (0, 0)


def test_bodies_that_arrive_hold_no_more_than_those_in_flight_may(make_engine):
    engine = make_engine(max_in_flight=1, max_body_bytes=100)
    with engine.admission() as other:
        other.receive(60)

        async def scenario():
            async def pieces():
                for _ in range(10):
                    yield b" " * 10

            transport = httpx.ASGITransport(create_app(engine))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(USERS, content=pieces(), headers={"Content-Type": JSON})

        answer = asyncio.run(scenario())
    assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
    assert engine.num_bytes_arriving == 0


@pytest.mark.parametrize(
    ("method", "path", "sent"),
    [
        ("POST", USERS, {"json": {"ids": [1]}}),
        ("POST", "/v1/lookup", {"json": {"tables": {}}}),
        ("GET", "/readyz", {}),
    ],
)
def test_api_answers_503_until_it_has_started(call, make_engine, method, path, sent):
    answer = call(method, path, make_engine(started=False), **sent)
    assert (answer.status_code, answer.json()["error_type"]) == (503, "not_ready")
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("method", "path", "status", "error_type"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/tables/", 404, "not_found"),
        ("GET", "/docs/assets/nope.js", 404, "not_found"),
        ("POST", f"{ITEMS}%0A", 404, "not_found"),
        ("POST", f"{ITEMS}%2F", 404, "not_found"),
        ("POST", "/v1/tables/item_id%2Flookup", 404, "not_found"),
        ("GET", "/readyz%0A", 404, "not_found"),
        ("GET", "/docs/assets/../../__init__.py", 404, "not_found"),
        ("GET", "/v1/lookup", 405, "method_not_allowed"),
        ("PUT", ITEMS, 405, "method_not_allowed"),
    ],
)
def test_api_answers_unknown_routes_and_methods_in_the_form_of_its_errors(call, method, path, status, error_type):
    answer = call(method, path)
    assert (answer.status_code, answer.json()["error_type"]) == (status, error_type)
    assert ("allow" in answer.headers) == (status == 405)


def test_api_answers_500_and_logs_what_nobody_expected(call, make_engine, monkeypatch, caplog):
    engine = make_engine()
    monkeypatch.setattr(engine, "find_rows", lambda requests: 1 / 0)
    with caplog.at_level(logging.ERROR, "service.http"):
        answer = call("POST", USERS, engine, json={"ids": [1]})
    assert (answer.status_code, answer.json()["error_type"]) == (500, "internal")
    assert "ZeroDivisionError" in caplog.text
    assert "division" not in answer.text
    assert b'code="500"' in engine.metrics.render()
