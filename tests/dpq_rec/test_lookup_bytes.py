"""Lookups from bytes to bytes, beside the lookups that they stand for."""

import numpy as np
import pytest

from dpq_rec import (
    CodeLayout,
    ConfigError,
    EmbeddingStore,
    IdentityVocabulary,
    IdTypeError,
    Int64Vocabulary,
    ModuloVocabulary,
    StringVocabulary,
    UnknownIdsError,
    UnknownTableError,
    write_artifact,
)
from tests.dpq_rec.builders import dense_contents, dpq_contents

NUM_ROWS = 40
IDS = [7, 0, 999, 39, 12, -5, 7, 40, 2**40]


def bytes_of(ids):
    return np.array(ids, "<i8").tobytes()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    layout = CodeLayout(num_subspaces=3, num_codes=5)
    integers = Int64Vocabulary.from_ids(np.arange(NUM_ROWS)[::-1].copy())
    vocabularies = {
        "identity": IdentityVocabulary(NUM_ROWS),
        "modulo": ModuloVocabulary(NUM_ROWS),
        "int64": integers,
        "string": StringVocabulary.from_ids([f"id {row}" for row in range(NUM_ROWS)]),
    }
    tables = {name: dpq_contents(NUM_ROWS, layout, vocabulary=ids) for name, ids in vocabularies.items()}
    tables["dense"] = dense_contents(np.arange(120, dtype=np.float32).reshape(NUM_ROWS, 3), integers)
    return EmbeddingStore.open(write_artifact(tmp_path_factory.mktemp("bytes") / "artifact", tables))


@pytest.mark.parametrize("ids", [IDS, [3], [40], [], list(range(NUM_ROWS)) * 20])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("table", ["identity", "modulo", "int64", "dense"])
def test_bytes_of_vectors_are_those_of_the_lookup(store, table, dtype, ids):
    vectors_NE, missing = store.lookup(table, ids, dtype=dtype)
    found = store.lookup_bytes(table, bytes_of(ids), form=dtype)
    assert bytes(found.reply) == vectors_NE.tobytes() + missing.astype("<u4").tobytes()
    assert found.num_missing == len(missing)


@pytest.mark.parametrize("ids", [IDS, [3], [40], []])
@pytest.mark.parametrize("table", ["identity", "modulo", "int64"])
def test_bytes_of_codes_are_those_of_the_store(store, table, ids):
    packed_NW, missing, _ = store.codes(table, ids)
    found = store.lookup_bytes(table, bytes_of(ids), form="codes")
    assert bytes(found.reply) == packed_NW.tobytes() + missing.astype("<u4").tobytes()
    assert found.num_missing == len(missing)


@pytest.mark.parametrize("form", ["float32", "codes"])
@pytest.mark.parametrize("table", ["identity", "int64"])
def test_unknown_ids_are_an_error_where_that_is_asked_for(store, table, form):
    assert store.lookup_bytes(table, bytes_of([1, 2]), form=form, missing="error").num_missing == 0
    with pytest.raises(UnknownIdsError, match="999") as error:
        store.lookup_bytes(table, bytes_of([1, 999, 2, -7]), form=form, missing="error")
    assert error.value.positions == [1, 3]


@pytest.mark.parametrize("table", ["identity", "int64", "dense"])
def test_half_an_id_is_refused(store, table):
    with pytest.raises(IdTypeError, match="got 9 bytes, want a multiple of 8"):
        store.lookup_bytes(table, b"123456789")


def test_a_table_of_strings_takes_no_bytes(store):
    with pytest.raises(IdTypeError, match="'string'"):
        store.lookup_bytes("string", bytes_of([1]))


def test_what_there_is_not_is_refused(store):
    with pytest.raises(ConfigError, match="it has vectors, and no codes"):
        store.lookup_bytes("dense", bytes_of([1]), form="codes")
    with pytest.raises(ConfigError, match="form: got 'float64', want float32, float16 or codes"):
        store.lookup_bytes("dense", bytes_of([1]), form="float64")
    with pytest.raises(ConfigError, match="missing: got 'no'"):
        store.lookup_bytes("dense", bytes_of([1]), missing="no")
    with pytest.raises(UnknownTableError):
        store.lookup_bytes("other", bytes_of([1]))
