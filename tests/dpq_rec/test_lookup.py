import concurrent.futures

import numpy as np
import pytest

from dpq_rec import (
    CodeLayout,
    ConfigError,
    DamagedArtifactError,
    EmbeddingStore,
    IdTypeError,
    Int64Vocabulary,
    UnknownIdsError,
    UnknownTableError,
    write_artifact,
)
from tests.dpq_rec.builders import dense_contents, dpq_contents, overwrite, small_artifact, word_artifact

DENSE = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def path(tmp_path):
    return small_artifact(tmp_path / "artifact")


@pytest.fixture
def store(path):
    return EmbeddingStore.open(path)


def test_lookup_finds_the_vectors_of_ids(store):
    vectors_NE, missing = store.lookup("dense", [2, 0])
    assert vectors_NE.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert (missing.tolist(), missing.dtype) == ([], np.uint32)


def test_rows_says_where_ids_are_and_which_are_unknown(store):
    rows_N, missing = store.rows("item", [7, 999, 40, -9])  # the ids of rows 0 to 3 are 40, -3, 7 and 2^40
    assert (rows_N.tolist(), rows_N.dtype) == ([2, -1, 0, -1], np.int64)
    assert (missing.tolist(), missing.dtype) == ([1, 3], np.uint32)


@pytest.mark.parametrize("table", ["item", "dense"])
def test_lookup_gives_zeros_to_unknown_ids_and_their_positions(store, table):
    known = 40 if table == "item" else 1
    vectors_NE, missing = store.lookup(table, [-9, known, 999])
    assert missing.tolist() == [0, 2]
    assert not vectors_NE[[0, 2]].any()
    assert vectors_NE[1].any()


@pytest.mark.parametrize("table", ["item", "dense"])
def test_lookup_raises_for_unknown_ids_where_asked_to(store, table):
    with pytest.raises(UnknownIdsError, match=r"2 id\(s\) .* table '\w+': -9, 999; .*missing='zeros'") as raised:
        store.lookup(table, [-9, 1 if table == "dense" else 7, 999], missing="error")
    assert (raised.value.table, raised.value.positions) == (table, [0, 2])


@pytest.mark.parametrize("table", ["item", "dense"])
def test_lookup_of_no_ids_is_no_vectors(store, table):
    vectors_NE, missing = store.lookup(table, [])
    assert vectors_NE.shape == (0, store.table(table).manifest.embedding_dim)
    assert missing.shape == (0,)


@pytest.mark.parametrize("table", ["item", "dense"])
def test_lookup_in_float16_is_the_float32_vectors_rounded(store, table):
    ids = [40, 7, 1, -3]
    vectors_NE = store.lookup(table, ids, dtype="float16").vectors
    assert vectors_NE.dtype == np.float16
    np.testing.assert_array_equal(vectors_NE, store.lookup(table, ids).vectors.astype(np.float16))


@pytest.mark.parametrize("table", ["item", "dense"])
def test_lookup_gives_arrays_that_the_caller_may_change(store, table):
    before = store.lookup(table, [1, 7]).vectors.copy()
    store.lookup(table, [1, 7]).vectors[...] = 9
    np.testing.assert_array_equal(store.lookup(table, [1, 7]).vectors, before)


@pytest.mark.parametrize(("option", "value"), [("dtype", "float64"), ("dtype", np.float32), ("missing", "ignore")])
def test_lookup_refuses_another_option(store, option, value):
    with pytest.raises(ConfigError, match=f"{option}: got"):
        store.lookup("dense", [1], **{option: value})


def test_lookup_names_the_tables_where_one_is_unknown(store):
    with pytest.raises(UnknownTableError, match="table 'usr' is not in this artifact; it has: dense, item"):
        store.lookup("usr", [1])


def test_lookup_refuses_ids_of_another_type(store):
    with pytest.raises(IdTypeError, match="got strings"):
        store.lookup("item", ["40"])


def test_lookup_notices_a_damaged_row(path):
    overwrite(path, "item", "packed_codes", 0, b"\xff")
    store = EmbeddingStore.open(path)
    with pytest.raises(DamagedArtifactError, match="row 0 holds a code of 5 or more"):
        store.lookup("item", [7, 40])


def test_lookup_notices_a_vocabulary_that_names_a_row_outside_the_table(path):
    overwrite(path, "item", "rows", 0, (4).to_bytes(4, "little"))
    with pytest.raises(DamagedArtifactError, match="row 4 is outside the table's 4 rows"):
        EmbeddingStore.open(path).lookup("item", [-3])


@pytest.mark.parametrize("row", [-2, 3, 2**40])
def test_decode_rows_notices_a_row_outside_a_dense_table(store, row):
    with pytest.raises(DamagedArtifactError, match=f"row {row} is outside the table's 3 rows"):
        store.table("dense").decode(np.array([0, row]))


def test_lookup_of_ids_that_share_a_row_gives_them_the_same_vector(tmp_path):
    vocabulary = Int64Vocabulary(np.array([1, 2, 5]), np.array([2, 0, 2], np.uint32))
    store = EmbeddingStore.open(write_artifact(tmp_path / "a", {"t": dense_contents(DENSE, vocabulary)}))
    assert store.lookup("t", [1, 5, 2]).vectors.tolist() == DENSE[[2, 2, 0]].tolist()


def test_lookup_finds_strings_and_reports_those_that_are_unknown(tmp_path):
    store = EmbeddingStore.open(word_artifact(tmp_path / "words"))
    vectors_NE, missing = store.lookup("word", ["ü", "The", "the", ""])
    assert (vectors_NE.tolist(), missing.tolist()) == ([[4, 5], [0, 0], [0, 1], [6, 7]], [1])


def test_lookup_refuses_integers_where_ids_are_strings(tmp_path):
    store = EmbeddingStore.open(word_artifact(tmp_path / "words"))
    with pytest.raises(IdTypeError, match="got int at position 0, want a flat list of strings"):
        store.lookup("word", [7])


def test_lookup_shows_unknown_strings_escaped_and_cut(tmp_path):
    store = EmbeddingStore.open(word_artifact(tmp_path / "words"))
    with pytest.raises(UnknownIdsError, match=r"table 'word': 'a\\nb', '%s\.\.\., 'c'; ask" % ("x" * 39)):
        store.lookup("word", ["the", "a\nb", "x" * 10_000, "c"], missing="error")


@pytest.mark.parametrize("offset", [2**62, -(2**63), -1, 11])
def test_lookup_reads_nothing_outside_the_ids_of_a_damaged_vocabulary(tmp_path, offset):
    path = word_artifact(tmp_path / "words")
    overwrite(path, "word", "id_offsets", 16, offset.to_bytes(8, "little", signed=True))
    with pytest.raises(DamagedArtifactError, match="lies outside its 10 bytes"):
        EmbeddingStore.open(path).lookup("word", ["7", "-ing", "ü", ""])


def test_store_is_safe_to_share_between_threads(tmp_path):
    contents = dpq_contents(5_000, CodeLayout(num_subspaces=8, num_codes=50))
    store = EmbeddingStore.open(write_artifact(tmp_path / "a", {"t": contents}))
    ids = [np.random.default_rng(seed).integers(-5, 5_005, 2_000) for seed in range(40)]
    alone = [store.lookup("t", ids_N).vectors for ids_N in ids]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda ids_N: store.lookup("t", ids_N).vectors, ids))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
