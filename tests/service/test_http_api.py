"""The HTTP API in this process: every form of request and reply, and every error of contract 4."""

import asyncio
import logging
import re
import uuid

import httpx
import numpy as np
import pytest

from service import http_schema
from service.http_api import create_app

JSON, OCTETS = "application/json", "application/octet-stream"
ITEMS = "/v1/tables/item_id/lookup"
USERS = "/v1/tables/user_id/lookup"
NAMES = "/v1/tables/name/lookup"


def octets(ids):
    return np.asarray(ids, "<i8").tobytes()


# Lookups


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("reply", [JSON, OCTETS])
@pytest.mark.parametrize("body", [JSON, OCTETS])
@pytest.mark.parametrize("num_ids", [1, 3, 400])
def test_lookup_gives_the_vectors_of_the_reference(call, references, dtype, reply, body, num_ids):
    ids = np.concatenate([references["item_id"].ids[:num_ids], [10**15]])[::-1]
    sent = {"json": {"ids": ids.tolist()}} if body == JSON else {"content": octets(ids)}
    answer = call("POST", f"{ITEMS}?dtype={dtype}", headers={"Content-Type": body, "Accept": reply}, **sent)
    vectors, missing = references["item_id"].lookup(ids, dtype)
    assert (answer.status_code, answer.headers["content-type"]) == (200, reply)
    if reply == JSON:
        found = answer.json()
        assert (found["table"], found["version"], found["dim"], found["missing"]) == ("item_id", "test-1", 24, missing)
        np.testing.assert_array_equal(np.array(found["vectors"]).astype(dtype), vectors)
        http_schema.LookupReply.model_validate(found)
        return
    assert answer.content == vectors.tobytes() + np.array(missing, "<u4").tobytes()
    wanted = {"rows": str(len(ids)), "dim": "24", "dtype": dtype, "missing": "1", "version": "test-1"}
    names = {
        "rows": "X-Num-Rows",
        "dim": "X-Dim",
        "dtype": "X-Dtype",
        "missing": "X-Num-Missing",
        "version": "X-Version",
    }
    assert {key: answer.headers[name] for key, name in names.items()} == wanted


@pytest.mark.parametrize("accept", ["*/*", None])
def test_lookup_replies_in_json_when_any_type_is_accepted(call, accept):
    answer = call("POST", USERS, json={"ids": [1]}, headers={"Accept": accept} if accept else {"Accept": ""})
    assert answer.headers["content-type"] == JSON


@pytest.mark.parametrize("sent", [{"json": {"ids": []}}, {"content": b"", "headers": {"Content-Type": OCTETS}}])
def test_lookup_of_no_ids_gives_no_vectors(call, sent):
    found = call("POST", ITEMS, **sent).json()
    assert (found["vectors"], found["missing"], found["dim"]) == ([], [], 24)


def test_lookup_takes_string_ids(call, make_engine, string_store):
    answer = call("POST", NAMES, make_engine(store=string_store), json={"ids": ["ü", "b", "", "7", "a", "ü"]})
    found = answer.json()
    assert (answer.status_code, found["missing"], found["dim"]) == (200, [1], 2)
    assert found["vectors"] == [[2, -1], [0, 0], [3, -2], [3, -2], [1, 0], [2, -1]]


def test_lookup_replies_in_bytes_to_string_ids(call, make_engine, string_store):
    answer = call("POST", NAMES, make_engine(store=string_store), json={"ids": ["ü", "b"]}, headers={"Accept": OCTETS})
    assert answer.content == np.array([2, -1, 0, 0], "<f4").tobytes() + np.array([1], "<u4").tobytes()


def test_lookup_of_no_string_ids_gives_no_vectors(call, make_engine, string_store):
    found = call("POST", NAMES, make_engine(store=string_store), json={"ids": []}).json()
    assert (found["vectors"], found["missing"], found["dim"]) == ([], [], 2)


def test_lookup_tables_takes_strings_for_one_table_and_integers_for_another(call, make_engine, string_store):
    tables = {"name": {"ids": ["a", "x"]}, "user_id": {"ids": [3]}}
    found = call("POST", "/v1/lookup", make_engine(store=string_store), json={"tables": tables}).json()["tables"]
    assert (found["name"]["vectors"], found["name"]["missing"]) == ([[1, 0], [0, 0]], [1])
    assert found["user_id"]["missing"] == []


def test_lookup_tables_answers_each_as_lookup_does(call):
    found = call(
        "POST", "/v1/lookup?dtype=float16", json={"tables": {"item_id": {"ids": [7]}, "user_id": {"ids": [3, 50]}}}
    )
    alone = call("POST", f"{USERS}?dtype=float16", json={"ids": [3, 50]})
    assert found.json()["tables"]["user_id"] == alone.json()
    assert found.json()["version"] == "test-1"
    assert list(found.json()["tables"]) == ["item_id", "user_id"]
    http_schema.MultiLookupReply.model_validate(found.json())


def test_lookup_tables_of_no_tables_is_empty(call):
    assert call("POST", "/v1/lookup", json={"tables": {}}).json() == {"version": "test-1", "tables": {}}


def test_tables_lists_what_is_served(call):
    found = call("GET", "/v1/tables").json()
    reply = http_schema.TablesReply.model_validate(found)
    assert (reply.version, [t.name for t in reply.tables]) == ("test-1", ["item_id", "user_id"])
    assert found["tables"][0]["features"] == ["item", "history"]


# Errors: (method, path, request, status, error_type, what the text says)

ERRORS = {
    "broken JSON": ("POST", ITEMS, {"content": b"{", "headers": {"Content-Type": JSON}}, 400, "malformed", "no JSON"),
    "no body": ("POST", ITEMS, {"headers": {"Content-Type": JSON}}, 400, "malformed", "no JSON"),
    "broken id": (
        "POST", ITEMS, {"content": b"1234567", "headers": {"Content-Type": OCTETS}}, 400, "malformed", "multiple of 8"
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
        "POST", "/v1/lookup", {"json": {"tables": {}}, "headers": {"Accept": OCTETS}}, 406, "not_acceptable", OCTETS
    ),
    "too many ids": ("POST", ITEMS, {"json": {"ids": list(range(301))}}, 413, "too_many_ids", "301, want at most 300"),
    "too many ids as bytes": (
        "POST", ITEMS, {"content": octets(range(301)), "headers": {"Content-Type": OCTETS}}, 413, "too_many_ids", "301"
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
    "no content type": ("POST", ITEMS, {"content": b"{}"}, 415, "unsupported_media_type", "got none"),
    "bytes for several": (
        "POST", "/v1/lookup", {"content": b"", "headers": {"Content-Type": OCTETS}},
        415, "unsupported_media_type", OCTETS,
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
        NAMES, {"content": b"12345678", "headers": {"Content-Type": OCTETS}}, 415, "unsupported_media_type", "string"
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


def test_lookup_takes_as_many_uuids_as_ids_are_allowed(call, make_engine, string_store):
    engine = make_engine(store=string_store)
    asked = [str(uuid.UUID(int=i)) for i in range(engine.settings.max_ids)]
    answer = call("POST", NAMES, engine, json={"ids": asked}, headers={"Accept": OCTETS})
    assert (answer.status_code, answer.headers["X-Num-Missing"]) == (200, str(engine.settings.max_ids))


def test_tables_says_which_have_string_ids(call, make_engine, string_store):
    found = call("GET", "/v1/tables", make_engine(store=string_store)).json()["tables"]
    assert [(table["name"], table["vocabulary"]) for table in found] == [("name", "string"), ("user_id", "identity")]
    assert found[0]["vocabulary_bytes"] == 4 + 5 * 8 + 4 * 4


def test_lookup_takes_as_many_ids_and_bytes_as_allowed(call, make_engine):
    engine = make_engine(max_ids=300, max_body_bytes=2400)
    answer = call("POST", ITEMS, engine, content=octets(range(300)), headers={"Content-Type": OCTETS})
    assert answer.status_code == 200


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


def test_lookup_gives_up_a_body_that_does_not_arrive(call, monkeypatch):
    async def stuck():
        yield b"{"
        await asyncio.sleep(60)

    monkeypatch.setattr("service.http_api._BODY_SECONDS", 0.05)
    answer = call("POST", ITEMS, content=stuck(), headers={"Content-Type": JSON})
    assert (answer.status_code, answer.json()["error_type"]) == (400, "malformed")


def test_lookup_refuses_more_requests_than_may_be_in_flight(make_engine):
    engine = make_engine(max_in_flight=1)

    async def scenario():
        arrived, go_on = asyncio.Event(), asyncio.Event()

        async def slow():
            arrived.set()
            await go_on.wait()
            yield b'{"ids": [1]}'

        transport = httpx.ASGITransport(create_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.create_task(client.post(USERS, content=slow(), headers={"Content-Type": JSON}))
            await arrived.wait()
            refused = [
                await client.post(USERS, json={"ids": [1]}),
                await client.post("/v1/lookup", json={"tables": {}}),
            ]
            healthy = await client.get("/readyz")
            go_on.set()
            return refused, healthy, await first, await client.post(USERS, json={"ids": [1]})

    refused, healthy, first, later = asyncio.run(scenario())
    for answer in refused:
        assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
        assert answer.headers["retry-after"] == "1"
    assert [healthy.status_code, first.status_code, later.status_code] == [200, 200, 200]


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


def test_readyz_fails_while_lookups_are_still_answered_when_draining(call, make_engine):
    engine = make_engine()
    engine.drain()
    assert call("GET", "/readyz", engine).status_code == 503
    assert call("GET", "/livez", engine).status_code == 200
    assert call("POST", USERS, engine, json={"ids": [1]}).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_health_says_its_status_and_version(call, path):
    answer = call("GET", path)
    assert answer.status_code == 200
    assert http_schema.Health.model_validate(answer.json()).version == "test-1"


@pytest.mark.parametrize(
    ("method", "path", "status", "error_type"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/tables/", 404, "not_found"),
        ("GET", "/docs/assets/nope.js", 404, "not_found"),
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
    monkeypatch.setattr(engine, "lookup", lambda requests: 1 / 0)
    with caplog.at_level(logging.ERROR, "service.http"):
        answer = call("POST", USERS, engine, json={"ids": [1]})
    assert (answer.status_code, answer.json()["error_type"]) == (500, "internal")
    assert "ZeroDivisionError" in caplog.text
    assert "division" not in answer.text
    assert b'code="500"' in engine.metrics.render()


# Keys


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer secret"}, {"authorization": "bearer secret"}, {"X-API-Key": "secret"}]
)
@pytest.mark.parametrize("path", ["/v1/tables", "/metrics"])
def test_api_takes_the_key_in_either_header(call, make_engine, headers, path):
    assert call("GET", path, make_engine(api_key="secret"), headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic secret"},
        {"X-API-Key": ""},
        {"X-API-Key": "sécret"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/tables"), ("POST", ITEMS), ("POST", "/v1/lookup?dtype=x"), ("GET", "/metrics")]
)
def test_api_refuses_another_key_before_anything_else(call, make_engine, headers, method, path):
    answer = call(
        method, path, make_engine(api_key="secret"), headers={k: v.encode("latin-1") for k, v in headers.items()}
    )
    assert (answer.status_code, answer.json()["error_type"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/docs", "/openapi.json", "/docs/assets/swagger-ui.css"])
def test_api_asks_no_key_of_health_and_documentation(call, make_engine, path):
    assert call("GET", path, make_engine(api_key="secret")).status_code == 200


def test_openapi_names_the_keys_only_where_they_are_asked_for(make_engine):
    with_key = create_app(make_engine(api_key="secret")).openapi()
    without = create_app(make_engine()).openapi()
    operation = with_key["paths"]["/v1/tables"]["get"]
    assert [list(choice) for choice in operation["security"]] == [["HTTPBearer"], ["APIKeyHeader"]]
    assert "401" in operation["responses"]
    assert "security" not in with_key["paths"]["/livez"]["get"]
    assert "security" not in without["paths"]["/v1/tables"]["get"]
    assert "401" not in without["paths"]["/v1/tables"]["get"]["responses"]


# Documentation


def test_docs_load_nothing_from_other_hosts(call, make_engine):
    engine = make_engine()
    page = call("GET", "/docs", engine).text
    assert "://" not in page
    assets = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert len(assets) == 3
    for asset in [*assets, "openapi.json"]:
        assert call("GET", f"/{asset}", engine).status_code == 200


def test_openapi_is_of_the_version_that_the_bundled_page_reads(call):
    assert call("GET", "/openapi.json").json()["openapi"].startswith("3.0.")


def test_openapi_describes_bodies_and_replies_of_lookup(make_engine):
    paths = create_app(make_engine()).openapi()["paths"]
    operation = paths["/v1/tables/{table}/lookup"]["post"]
    assert set(operation["requestBody"]["content"]) == {JSON, OCTETS}
    schema = operation["requestBody"]["content"][JSON]["schema"]
    assert schema["required"] == ["ids"]
    assert [kind["items"]["type"] for kind in schema["properties"]["ids"]["anyOf"]] == ["integer", "string"]
    assert set(operation["responses"]["200"]["content"]) == {JSON, OCTETS}
    assert {"X-Num-Rows", "X-Dim", "X-Dtype", "X-Num-Missing", "X-Version"} == set(
        operation["responses"]["200"]["headers"]
    )
    parameters = {p["name"]: p["schema"] for p in operation["parameters"]}
    assert parameters["dtype"]["enum"] == ["float32", "float16"]
    assert parameters["missing"]["enum"] == ["zeros", "error"]
    assert set(operation["responses"]) == {"200", "400", "404", "406", "413", "415", "422", "429", "500", "503"}
    assert all(
        reply["content"][JSON]["schema"]["$ref"].endswith("/ErrorReply")
        for status, reply in operation["responses"].items()
        if status != "200"
    )
    assert set(paths) == {
        "/livez", "/readyz", "/metrics", "/v1/tables", "/v1/tables/{table}/lookup", "/v1/lookup"
    }  # fmt: skip


def test_openapi_refers_to_nothing_that_it_does_not_hold(make_engine):
    schema = create_app(make_engine(api_key="k")).openapi()
    names = set(re.findall(r"#/components/schemas/(\w+)", str(schema)))
    assert names <= set(schema["components"]["schemas"])
    assert "HTTPValidationError" not in schema["components"]["schemas"]


# Metrics


def test_metrics_count_requests_by_route_and_ids_by_table(call, make_engine):
    engine = make_engine()
    call("POST", USERS, engine, json={"ids": [1, 99]})
    call("POST", "/v1/tables/%22%0Ainjected/lookup", engine, json={"ids": []})
    call("BREW", "/livez", engine)
    call("GET", "/no/such/path", engine)
    answer = call("GET", "/metrics", engine)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = set(answer.text.splitlines())
    lookups = 'dpq_requests_total{api="http",code="%s",method="POST /v1/tables/{table}/lookup"} 1.0'
    assert {
        lookups % 200,
        lookups % 404,
        'dpq_ids_total{table="user_id"} 2.0',
        'dpq_missing_ids_total{table="user_id"} 1.0',
        'dpq_requests_total{api="http",code="404",method="unmatched"} 1.0',
        'dpq_requests_total{api="http",code="405",method="unmatched"} 1.0',
        'dpq_artifact_info{version="test-1"} 1.0',
        "dpq_ready_workers 1.0",
        "dpq_in_flight_requests 0.0",
    } <= lines
