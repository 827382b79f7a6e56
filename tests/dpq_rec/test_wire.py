"""Packed rows and values that travel, held to EmbeddingStore.lookup bit for bit."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_rec import (
    CodeLayout,
    ConfigError,
    DamagedArtifactError,
    EmbeddingStore,
    IdentityVocabulary,
    TableContents,
    UnknownIdsError,
    pack_codes,
    write_artifact,
)
from dpq_rec.codes import cut_into_tiers
from dpq_rec.tensorfile import pack_tensors
from dpq_rec.wire import Values


def store_of(folder, layout, *, num_rows=20, shares=(), shared=False, dtype="float32"):
    """One table `t` of random codes and values."""
    rng, tiers = np.random.default_rng(1), cut_into_tiers(layout, num_rows, shares)
    groups = layout.num_levels if shared else layout.codes_per_row
    contents = TableContents(
        num_embeddings=num_rows,
        embedding_dim=3 * layout.num_subspaces,
        vocabulary=IdentityVocabulary(num_rows),
        layout=layout,
        tiers=tiers if shares else (),
        values=rng.standard_normal((groups, layout.num_codes, 3)).astype(dtype),
        chunks=[
            pack_codes(rng.integers(0, layout.num_codes, (tier.num_rows, tier.layout.codes_per_row)), tier.layout)
            for tier in tiers
        ],
    )
    return EmbeddingStore.open(write_artifact(folder / "artifact", {"t": contents}))


@settings(max_examples=40)
@given(
    num_codes=st.sampled_from([2, 5, 16, 256, 300]),
    num_subspaces=st.integers(1, 5),
    shares=st.sampled_from([(), ((0.3, 2),), ((0.1, 2), (0.5, 1)), ((0.0, 1),)]),
    shared=st.booleans(),
    dtype=st.sampled_from(["float32", "float16"]),
    ids=st.lists(st.integers(-2, 22), max_size=30),
)
def test_values_decode_packed_rows_to_the_vectors_of_the_store(
    tmp_path_factory, num_codes, num_subspaces, shares, shared, dtype, ids
):
    layout = CodeLayout(num_subspaces=num_subspaces, num_codes=num_codes, num_levels=3 if shares else 1)
    folder = tmp_path_factory.mktemp("packed")
    store = store_of(folder, layout, shares=shares, shared=shared, dtype=dtype)
    rows, wanted = store.codes("t", ids), store.lookup("t", ids)
    values = Values.from_bytes(store.tables["t"].values(store.version).to_bytes())
    assert values.decode(rows).tobytes() == wanted.vectors.tobytes()
    assert rows.missing.tolist() == wanted.missing.tolist()
    assert not rows.packed_NW[rows.missing].any()
    assert values.version == store.version


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"packed_NW": np.zeros((3, 1), np.uint8)}, "got 1 bytes a row, want 6"),
        ({"missing": np.array([3], np.uint32)}, "position 3 of 3 rows"),
        ({"missing": np.array([-1])}, "missing: got int64"),
        ({"missing": np.array([[1]], np.uint32)}, "missing: got uint32"),
        ({"packed_NW": np.zeros((3, 6))}, "codes: got float64"),
        ({"packed_NW": np.zeros(6, np.uint8)}, "codes: got uint8"),
        ({"tiers_N": None}, "tiers: want those of a table that has 2"),
        ({"tiers_N": np.array([0, 2, 0], np.uint8)}, "tiers: want 3 of 2"),
        ({"tiers_N": np.array([0], np.uint8)}, "tiers: want 3 of 2"),
    ],
)
def test_rows_of_another_table_are_damage(tmp_path, changes, match):
    store = store_of(tmp_path, CodeLayout(num_subspaces=2, num_codes=256, num_levels=3), shares=((0.5, 1),))
    values = Values.from_bytes(store.tables["t"].values("v").to_bytes())
    rows = store.codes("t", [0, 1, 19])
    assert len(values.decode(rows)) == 3
    with pytest.raises(DamagedArtifactError, match=match):
        values.decode(rows._replace(**changes))


def test_values_of_tiers_that_have_more_levels_than_the_first_are_damage(tmp_path):
    store = store_of(tmp_path, CodeLayout(num_subspaces=2, num_codes=256, num_levels=3), shares=((0.5, 1),))
    content = store.tables["t"].values("v").to_bytes()
    with pytest.raises(DamagedArtifactError, match="values"):
        Values.from_bytes(content.replace(b"[3, 1]", b"[3, 4]"))


def test_values_are_read_by_the_safetensors_library(tmp_path):
    store = store_of(tmp_path, CodeLayout(num_subspaces=2, num_codes=5), dtype="float16")
    found = safetensors.numpy.load(store.tables["t"].values("v").to_bytes())
    np.testing.assert_array_equal(found["values"], store.tables["t"].tensors["values"])


def test_codes_of_an_empty_table_are_of_missing_ids_alone(tmp_path):
    rows = store_of(tmp_path, CodeLayout(num_subspaces=2, num_codes=256), num_rows=0).codes("t", [0, 7])
    assert (rows.packed_NW.tolist(), rows.missing.tolist()) == ([[0, 0], [0, 0]], [0, 1])


def test_codes_refuse_unknown_ids_when_asked_to(tmp_path):
    store = store_of(tmp_path, CodeLayout(num_subspaces=2, num_codes=5))
    with pytest.raises(UnknownIdsError, match="99"):
        store.codes("t", [1, 99], missing="error")


@pytest.mark.parametrize("shares", [(), ((0.5, 1),)])
def test_a_row_outside_the_table_is_damage(tmp_path, shares):
    store = store_of(tmp_path, CodeLayout(num_subspaces=2, num_codes=5, num_levels=2), shares=shares)
    table = dataclasses.replace(store.tables["t"], vocabulary=IdentityVocabulary(21))
    with pytest.raises(DamagedArtifactError, match="row 20 is outside the table's 20 rows"):
        table.codes([3, 20])


def test_a_code_that_the_values_do_not_know_is_damage(tmp_path):
    store = store_of(tmp_path, CodeLayout(num_subspaces=2, num_codes=5))
    values = Values.from_bytes(store.tables["t"].values("v").to_bytes())
    rows = store.codes("t", [1])
    with pytest.raises(DamagedArtifactError, match="a code of 5 or more"):
        values.decode(rows._replace(packed_NW=np.full_like(rows.packed_NW, 0x3F)))


def test_values_of_more_tiers_than_a_byte_can_number_are_damage():
    metadata = {"version": "v", "num_subspaces": "1", "num_codes": "2", "code_bits": "1"}
    values = np.ones((257, 2, 1), np.float32)
    for num_tiers, is_sound in ((256, True), (257, False)):
        levels = json.dumps([*range(257, 257 - num_tiers, -1)])
        content = pack_tensors({"values": values}, {**metadata, "num_levels": levels})
        with contextlib.nullcontext() if is_sound else pytest.raises(DamagedArtifactError, match="values: got"):
            assert len(Values.from_bytes(content).layouts) == num_tiers


@pytest.mark.parametrize("levels", ["[2.0]", "[true]", "[NaN]", "2", "[]", "[null]", '["2"]', "[0]", "[" * 99_999])
def test_values_of_levels_that_are_no_counts_are_damage(levels):
    metadata = {"version": "v", "num_subspaces": "1", "num_codes": "2", "code_bits": "1", "num_levels": levels}
    content = pack_tensors({"values": np.ones((2, 2, 1), np.float32)}, metadata)
    with pytest.raises(DamagedArtifactError, match="values: got"):
        Values.from_bytes(content)


def test_a_dense_table_has_neither_codes_nor_values(tmp_path):
    rows = np.ones((2, 2), np.float32)
    dense = TableContents(num_embeddings=2, embedding_dim=2, vocabulary=IdentityVocabulary(2), chunks=[rows])
    store = EmbeddingStore.open(write_artifact(tmp_path / "artifact", {"t": dense}))
    with pytest.raises(ConfigError, match="'t' is of kind 'dense': it has vectors, and no codes"):
        store.codes("t", [1])
    with pytest.raises(ConfigError, match="it has vectors, and no values"):
        store.tables["t"].values("v").to_bytes()


def test_values_cannot_be_changed_by_mistake(tmp_path):
    store = store_of(tmp_path, CodeLayout(num_subspaces=2, num_codes=5))
    values = Values.from_bytes(store.tables["t"].values("v").to_bytes())
    with pytest.raises(dataclasses.FrozenInstanceError):
        values.version = "w"
