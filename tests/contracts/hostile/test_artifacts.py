"""Hostile artifacts at every entry: refused in one line, soon and in little memory; and odd ones, which are served."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import json
import operator
import os
import re
import resource
import tracemalloc
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpq_rec import (
    ArtifactError,
    ConfigError,
    DamagedArtifactError,
    EmbeddingStore,
    IdentityVocabulary,
    TableContents,
    open_artifact,
    publish,
    verify,
    write_artifact,
)
from dpq_rec.cli import main as command
from dpq_rec.export import export_table
from dpq_rec.report import write_report
from dpq_rec.wire import Values
from service.__main__ import main as serve
from service.engine import Engine
from service.http_app import create_app
from service.metrics import Metrics
from service.settings import Settings
from tests.contracts.hostile.artifacts import NAMES, OPEN, SOUND, VERIFY, VERSION, edit, sparse, top, write_good

REFUSED = {**OPEN, **VERIFY}
OTHER_FORMATS = ("format_version: true", "format_version: a float")
# One of each kind, for what costs more than to open.
FEW_REFUSED = list({name.partition(":")[0]: name for name in REFUSED if name not in OTHER_FORMATS}.values())
# Names that are none of features, either.
FEATURES_TOO = [name for name in NAMES if re.search("line end|NUL|escape|script|256|100,000", name)]
MOST_CHARACTERS = 1_000  # of what is said
MOST_BYTES = 256 << 20  # that opening may take, whatever a file claims


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_good(tmp_path_factory.mktemp("good") / "artifact")


@pytest.fixture
def artifact(good, tmp_path):
    """A copy that may be damaged."""
    return _copy(good, tmp_path / "artifact")


def _copy(source: Path, target: Path) -> Path:
    for file in [file for file in source.rglob("*") if file.is_file()]:
        copied = target / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
    return target


def assert_one_line(text: str, says: str) -> None:
    assert text.count("\n") <= text.endswith("\n")
    assert text.rstrip("\n").isprintable()
    assert len(text) < MOST_CHARACTERS
    assert re.search(says, text)


@pytest.mark.parametrize("name", OPEN)
def test_open_refuses_a_hostile_artifact_in_one_line(artifact, name):
    OPEN[name].damage(artifact)
    with pytest.raises(ArtifactError) as raised:
        open_artifact(artifact)
    assert isinstance(raised.value, DamagedArtifactError) == (name not in OTHER_FORMATS)
    assert_one_line(str(raised.value), OPEN[name].says)


@pytest.mark.parametrize("name", [name for name in OPEN if re.search("header: lists|nested|GB|too large|1,000", name)])
def test_open_takes_little_memory_whatever_a_file_claims(artifact, name):
    OPEN[name].damage(artifact)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedArtifactError):
            open_artifact(artifact)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", VERIFY)
def test_verify_refuses_in_one_line_what_opens(artifact, name):
    VERIFY[name].damage(artifact)
    open_artifact(artifact)
    with pytest.raises(DamagedArtifactError) as raised:
        verify(artifact)
    assert_one_line(str(raised.value), VERIFY[name].says)


@pytest.mark.parametrize("name", FEW_REFUSED)
def test_publish_refuses_a_hostile_artifact_and_leaves_the_store_as_it_was(artifact, good, tmp_path, name):
    store = tmp_path / "store"
    publish(_published_as(good, tmp_path, "v0"), store)
    REFUSED[name].damage(artifact)
    with pytest.raises(DamagedArtifactError, match=REFUSED[name].says):
        publish(artifact, store)
    assert sorted(path.name for path in store.iterdir()) == ["CURRENT", "v0"]
    assert open_artifact(store).version == "v0"


def _published_as(good, tmp_path, version):
    renamed = _copy(good, tmp_path / version)
    top(version=version)(renamed)
    return renamed


@pytest.mark.parametrize("name", [name for name in FEW_REFUSED if name in OPEN])
def test_a_store_whose_current_version_is_hostile_is_refused(artifact, tmp_path, name):
    OPEN[name].damage(artifact)
    artifact.rename(tmp_path / VERSION)
    (tmp_path / "CURRENT").write_text(f"{VERSION}\n")
    with pytest.raises(DamagedArtifactError, match=OPEN[name].says):
        open_artifact(tmp_path)


@pytest.mark.parametrize("name", FEW_REFUSED)
def test_command_ends_with_1_and_one_line(artifact, capsys, name):
    REFUSED[name].damage(artifact)
    assert command(["verify", str(artifact)]) == 1
    shown, said = capsys.readouterr()
    assert shown == ""
    assert_one_line(said, REFUSED[name].says)


@pytest.mark.parametrize("name", [name for name in FEW_REFUSED if name in OPEN])
def test_server_does_not_start_and_says_why_in_one_line(artifact, capsys, monkeypatch, name):
    for variable in [variable for variable in os.environ if variable.startswith("DPQ_")]:
        monkeypatch.delenv(variable)
    OPEN[name].damage(artifact)
    assert serve(["--artifact", str(artifact), "--http-port", "0", "--grpc-port", "0"]) == 1
    assert_one_line(capsys.readouterr().err, OPEN[name].says)


def places_in(found, at=()):
    """Where a manifest holds something."""
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places_in(value, (*at, key))


SOMETHING = st.sampled_from(
    [
        *(None, True, 0, 1, 2, 3, 4, 5, 8, -1, 2**31, 2**63, 2**64, 4.0, 1e300, [], {}, [1], [[]]),
        *("", "x", "\ud800", "a" * 300, "int64", "identity", "modulo", "string", "dense", "dpq", "dpq-tiers"),
        "tables/dense.safetensors",
    ]
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_with_anything_anywhere_opens_and_serves_or_is_refused_in_one_line(artifact, good, data):
    manifest = json.loads((good / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        *above, last = data.draw(st.sampled_from(list(places_in(manifest))))
        functools.reduce(operator.getitem, above, manifest)[last] = copy.deepcopy(data.draw(SOMETHING))
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    try:
        store = EmbeddingStore.open(artifact)
    except ArtifactError as error:
        assert_one_line(str(error), "")
        return
    for name, table in store.tables.items():
        ids = ["the"] if table.vocabulary.kind == "string" else [0, 7]
        with contextlib.suppress(DamagedArtifactError):
            assert store.lookup(name, ids).vectors.shape == (len(ids), table.manifest.embedding_dim)


# CURRENT of a store


def another_version(store):
    (store / VERSION).rename(store / "v2")
    (store / "CURRENT").write_text("v2\n")


CURRENTS = {
    "another version's folder": (another_version, "names 'v2', but the manifest in v2 says version v1"),
    "a folder that is not there": (lambda store: (store / "CURRENT").write_text("v9"), "names 'v9', which is not"),
    "itself": (lambda store: (store / "CURRENT").write_text("CURRENT"), "names 'CURRENT', which is not"),
    "a folder up": (lambda store: (store / "CURRENT").write_text("../store/v1"), "which is not a version"),
    "a line more": (lambda store: (store / "CURRENT").write_text("v1\n\n"), "which is not a version"),
    "another line end": (lambda store: (store / "CURRENT").write_bytes(b"v1\r\n"), "which is not a version"),
    "NUL": (lambda store: (store / "CURRENT").write_bytes(b"v1\0"), "which is not a version"),
    "UTF-16": (lambda store: (store / "CURRENT").write_bytes("v1".encode("utf-16")), "which is not a version"),
    "300 letters": (lambda store: (store / "CURRENT").write_text("v" * 300), "which is not a version"),
    "3 GB": (sparse("CURRENT", 3 << 30, b"v1\n"), "which is not a version"),
}


@pytest.mark.parametrize("name", CURRENTS)
def test_a_store_whose_current_names_no_version_of_it_is_refused(good, tmp_path, name):
    damage, says = CURRENTS[name]
    store = tmp_path / "store"
    _copy(good, store / VERSION)
    (store / "CURRENT").write_text(f"{VERSION}\n")
    assert open_artifact(store).version == VERSION
    damage(store)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedArtifactError, match=r"CURRENT: names .*") as raised:
            open_artifact(store)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert_one_line(str(raised.value), says)


@pytest.mark.parametrize("name", CURRENTS)
def test_publish_mends_a_store_whose_current_names_no_version(good, tmp_path, name):
    store = tmp_path / "store"
    _copy(good, store / VERSION)
    CURRENTS[name][0](store)
    publish(good, store)
    assert open_artifact(store).version == VERSION


def test_a_path_of_a_name_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_artifact(tmp_path / ("x" * 300))


# Odd, and sound


@pytest.mark.parametrize("name", SOUND)
def test_an_odd_artifact_is_sound_in_every_way_in_process(artifact, tmp_path, name):
    SOUND[name](artifact)
    opened = verify(artifact)
    store = EmbeddingStore.open(artifact)
    for table in list(opened.tables.values())[:6]:
        ids = table.vocabulary.ids_of_rows(0, table.manifest.num_embeddings)[0].tolist()
        vectors, missing = store.lookup(table.name, [*ids, *([] if table.vocabulary.kind == "string" else [-99])])
        assert np.isfinite(vectors).all()
        assert missing.tolist() in ([], [len(ids)])
        if ids:
            found, _ = store.search(table.name, vectors[: len(ids)], 1)
            assert np.shape(found) == (len(ids), 1)
        if table.manifest.has_codes:
            values = Values.from_bytes(table.values(store.version).to_bytes())
            np.testing.assert_array_equal(values.decode(store.codes(table.name, ids)), vectors[: len(ids)])
        assert export_table(table, tmp_path / "exports" / table.name)[1] >= len(ids)
    write_report(opened, tmp_path / "report.html")
    assert command(["inspect", str(artifact)]) == 0


@pytest.mark.parametrize("name", SOUND)
def test_an_odd_artifact_is_published_and_served(artifact, tmp_path, name):
    SOUND[name](artifact)
    publish(artifact, tmp_path / "store")
    store = EmbeddingStore.open(tmp_path / "store")
    engine = Engine(store, Settings(artifact=tmp_path / "store"), Metrics(store.version))
    engine.start()

    async def ask():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(engine)), base_url="http://test"
        ) as client:
            listed = await client.get("/v1/tables")
            assert listed.status_code == 200
            assert {table["name"] for table in listed.json()["tables"]} == set(store.tables)
            for table in list(store.tables.values())[:6]:
                ids = ["the"] if table.vocabulary.kind == "string" else [1]
                for accept in ("application/json", "application/octet-stream", "application/vnd.apache.arrow.stream"):
                    answer = await client.post(
                        f"/v1/tables/{table.name}/lookup", json={"ids": ids}, headers={"Accept": accept}
                    )
                    assert answer.status_code == 200, (table.name, accept, answer.text)
                    if accept == "application/octet-stream":
                        assert answer.headers["X-Version"] == store.version

    asyncio.run(ask())


def test_the_file_of_200_tables_is_mapped_once_and_its_values_are_copied_once(artifact):
    SOUND["one file of 200 tables"](artifact)
    tables = open_artifact(artifact).tables.values()
    assert len(tables) == 200
    assert len({table.tensors["values_fp32"].ctypes.data for table in tables}) == 1
    assert len({table.tensors["packed_codes"].ctypes.data for table in tables}) == 1
    assert Path("/proc/self/maps").read_text().count(str(artifact)) == 1


def test_more_tables_open_than_descriptors_are_allowed(good, tmp_path):
    many = _copy(good, tmp_path / "many")

    def add(manifest):
        entry = manifest["tables"]["item"]
        manifest["tables"] = {f"t{i}": {**entry, "file": f"tables/t{i}.safetensors"} for i in range(1_100)}
        for i in range(1_100):
            (many / f"tables/t{i}.safetensors").hardlink_to(many / "tables/item.safetensors")

    edit(add)(many)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, before[1]), before[1]))
    try:
        store = EmbeddingStore.open(many)
        assert store.lookup("t1099", [40, 7]).missing.tolist() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# Written


@pytest.mark.parametrize("what", ["version", "table", "feature"])
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("half", "nothing"))])
def test_write_artifact_refuses_the_names_that_open_refuses(tmp_path, what, name):
    contents = TableContents(
        num_embeddings=1,
        embedding_dim=1,
        vocabulary=IdentityVocabulary(1),
        chunks=[np.ones((1, 1), np.float32)],
        features=(NAMES[name],) if what == "feature" else (),
    )
    is_wrong = what != "feature" or name in FEATURES_TOO
    tables = {NAMES[name] if what == "table" else "t": contents}
    with pytest.raises(ConfigError, match=f"{what}.*: got") if is_wrong else contextlib.nullcontext():
        write_artifact(tmp_path / "a", tables, version=NAMES[name] if what == "version" else None)
    assert bool(list(tmp_path.iterdir())) != is_wrong


@pytest.mark.parametrize("version", ["CURRENT", "current", "", 7, b"v1"])
def test_write_artifact_refuses_a_version_that_no_store_could_have(tmp_path, version):
    with pytest.raises(ConfigError, match="version: got"):
        write_artifact(tmp_path / "a", {}, version=version)
