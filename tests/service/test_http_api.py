"""The HTTP API in this process: every form of request and reply of contract 4. test_http_errors.py has its errors."""

import re
import uuid

import numpy as np
import openapi_spec_validator
import pytest

from service import http_schema
from service.http_app import create_app
from tests.service.http_requests import ARROW, BINARY, CODES, ITEMS, JSON, NAMES, USERS, id_bytes

# Lookups


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("reply", [JSON, BINARY])
@pytest.mark.parametrize("body", [JSON, BINARY])
@pytest.mark.parametrize("num_ids", [1, 3, 400])
def test_lookup_gives_the_vectors_of_the_reference(call, references, dtype, reply, body, num_ids):
    ids = np.concatenate([references["item_id"].ids[:num_ids], [10**15]])[::-1]
    sent = {"json": {"ids": ids.tolist()}} if body == JSON else {"content": id_bytes(ids)}
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


@pytest.mark.parametrize("sent", [{"json": {"ids": []}}, {"content": b"", "headers": {"Content-Type": BINARY}}])
def test_lookup_of_no_ids_gives_no_vectors(call, sent):
    found = call("POST", ITEMS, **sent).json()
    assert (found["vectors"], found["missing"], found["dim"]) == ([], [], 24)


def test_lookup_takes_string_ids(call, make_engine, string_store):
    answer = call("POST", NAMES, make_engine(store=string_store), json={"ids": ["ü", "b", "", "7", "a", "ü"]})
    found = answer.json()
    assert (answer.status_code, found["missing"], found["dim"]) == (200, [1], 2)
    assert found["vectors"] == [[2, -1], [0, 0], [3, -2], [3, -2], [1, 0], [2, -1]]


def test_lookup_replies_in_bytes_to_string_ids(call, make_engine, string_store):
    answer = call("POST", NAMES, make_engine(store=string_store), json={"ids": ["ü", "b"]}, headers={"Accept": BINARY})
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


def test_lookup_takes_as_many_uuids_as_ids_are_allowed(call, make_engine, string_store):
    engine = make_engine(store=string_store)
    texts = [str(uuid.UUID(int=i)) for i in range(engine.settings.max_ids)]
    answer = call("POST", NAMES, engine, json={"ids": texts}, headers={"Accept": BINARY})
    assert (answer.status_code, answer.headers["X-Num-Missing"]) == (200, str(engine.settings.max_ids))


def test_tables_says_which_have_string_ids(call, make_engine, string_store):
    found = call("GET", "/v1/tables", make_engine(store=string_store)).json()["tables"]
    assert [(table["name"], table["vocabulary"]) for table in found] == [("name", "string"), ("user_id", "identity")]
    assert found[0]["vocabulary_bytes"] == 4 + 5 * 8 + 4 * 4 + 7 * 4


def test_lookup_takes_as_many_ids_and_bytes_as_allowed(call, make_engine):
    engine = make_engine(max_ids=300, max_body_bytes=2400)
    answer = call("POST", ITEMS, engine, content=id_bytes(range(300)), headers={"Content-Type": BINARY})
    assert answer.status_code == 200


# Health


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
    assert set(operation["requestBody"]["content"]) == {JSON, BINARY}
    schema = operation["requestBody"]["content"][JSON]["schema"]
    assert schema["required"] == ["ids"]
    assert [kind["items"]["type"] for kind in schema["properties"]["ids"]["anyOf"]] == ["integer", "string"]
    assert set(operation["responses"]["200"]["content"]) == {JSON, BINARY, CODES, ARROW}
    assert {"X-Num-Rows", "X-Dim", "X-Dtype", "X-Row-Bytes", "X-Num-Missing", "X-Version"} == set(
        operation["responses"]["200"]["headers"]
    )
    parameters = {p["name"]: p["schema"] for p in operation["parameters"]}
    assert parameters["dtype"]["enum"] == ["float32", "float16"]
    assert parameters["missing"]["enum"] == ["zeros", "error"]
    assert parameters["pooling"]["enum"] == ["none", "sum", "mean"]
    assert set(operation["responses"]) == {"200", "400", "404", "406", "413", "415", "422", "429", "500", "503"}
    assert all(
        reply["content"][JSON]["schema"]["$ref"].endswith("/ErrorReply")
        for status, reply in operation["responses"].items()
        if status != "200"
    )
    assert set(paths) == {
        "/livez", "/readyz", "/metrics", "/v1/tables", "/v1/tables/{table}/lookup", "/v1/tables/{table}/search",
        "/v1/tables/{table}/values", "/v1/lookup"
    }  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"api_key": "k"}])
def test_openapi_is_valid_in_the_version_that_it_names(call, make_engine, settings):
    openapi_spec_validator.validate(call("GET", "/openapi.json", make_engine(**settings)).json())


def test_openapi_refers_to_nothing_that_it_does_not_hold(make_engine):
    schema = create_app(make_engine(api_key="k")).openapi()
    names = set(re.findall(r"#/components/schemas/(\w+)", str(schema)))
    assert names <= set(schema["components"]["schemas"])
    assert "HTTPValidationError" not in schema["components"]["schemas"]


# HEAD, and queries

GETS = [
    "/livez", "/readyz", "/v1/tables", "/v1/tables/item_id/values", "/docs", "/openapi.json",
    "/docs/assets/swagger-ui.css", "/v1/tables/usr/values", "/no/such/path", "/v1/lookup",
]  # fmt: skip


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_its_body(call, path):
    got, answer = call("GET", path), call("HEAD", path)
    assert (answer.status_code, dict(answer.headers), answer.content) == (got.status_code, dict(got.headers), b"")


def test_head_of_metrics_is_answered(call):
    answer = call("HEAD", "/metrics")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 100


@pytest.mark.parametrize(("started", "api_key", "status"), [(False, None, 503), (True, "secret", 200)])
def test_head_of_readyz_says_whether_it_is_ready(call, make_engine, started, api_key, status):
    assert call("HEAD", "/readyz", make_engine(started=started, api_key=api_key)).status_code == status


def test_head_asks_for_the_key_and_is_counted_as_get(call, make_engine):
    engine = make_engine(api_key="secret")
    assert call("HEAD", "/v1/tables", engine).status_code == 401
    text = call("GET", "/metrics", engine, headers={"X-API-Key": "secret"}).text
    assert 'dpq_requests_total{api="http",code="401",method="GET /v1/tables"} 1.0' in text


QUERIES = {
    "a name mistyped": (ITEMS, "dtpye=float16", "'dtpye', want some of dtype, missing, pooling, num_bags"),
    "a name mistyped beside one that is right": (ITEMS, "dtype=float16&Missing=error", "'Missing'"),
    "a name alone": (ITEMS, "float16", "'float16'"),
    "the same twice": (ITEMS, "dtype=float16&dtype=float16", "dtype: got it 2 times in the query"),
    "two that differ": (ITEMS, "dtype=float16&dtype=float32", "dtype: got it 2 times in the query"),
    "percent-encoded twice": (ITEMS, "dtype=float16&%64type=float32", "dtype: got it 2 times in the query"),
    "of several tables": ("/v1/lookup", "pooling=sum", "'pooling', want some of dtype, missing"),
    "of a search": ("/v1/tables/item_id/search", "k=3", "'k', want some of missing, ids"),
    "of values": ("/v1/tables/item_id/values", "dtype=float16", "'dtype', want none here"),
    "of tables": ("/v1/tables", "limit=1", "'limit', want none here"),
    "of livez": ("/livez", "verbose", "'verbose', want none here"),
    "of readyz": ("/readyz", "a=", "'a', want none here"),
    "of metrics": ("/metrics", "name=x", "'name', want none here"),
    "of the documentation": ("/docs", "x=1", "'x', want none here"),
    "of openapi.json": ("/openapi.json", "x=1", "'x', want none here"),
}


@pytest.mark.parametrize(("path", "query", "said"), QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("given", [JSON, BINARY])
def test_a_parameter_that_is_not_known_or_not_alone_is_refused(call, path, query, said, given):
    method = "POST" if path.endswith(("lookup", "search")) else "GET"
    answer = call(method, f"{path}?{query}", content=id_bytes([1]), headers={"Content-Type": given})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "invalid_request")
    assert said in answer.json()["error"]


@pytest.mark.parametrize("query", ["", "dtype=float32", "&&", "missing=zeros&dtype=float32&pooling=none"])
def test_a_query_of_known_parameters_is_taken(call, query):
    assert call("POST", f"{ITEMS}?{query}", json={"ids": [1]}).status_code == 200


def test_a_wrong_key_is_refused_before_a_wrong_query(call, make_engine):
    assert call("GET", "/v1/tables?x=1", make_engine(api_key="secret")).status_code == 401


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
