"""Search held to brute force on the decoded vectors, over every kind of table and vocabulary."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import (
    CodeLayout,
    ConfigError,
    DamagedArtifactError,
    EmbeddingStore,
    Int64Vocabulary,
    ModuloVocabulary,
    StringVocabulary,
    UnknownTableError,
    pack_codes,
    search,
    write_artifact,
)
from dpq_rec.codes import cut_into_tiers
from tests.dpq_rec.builders import dense_contents, dpq_contents, write_unchecked

NUM_ROWS = 300
LAYOUT = CodeLayout(num_subspaces=4, num_codes=16)
RESIDUAL = CodeLayout(num_subspaces=2, num_codes=5, num_levels=3)
SHARED = [0, 1, *range(NUM_ROWS - 2)]  # ids 0 and 2, 1 and 3 share a row, rows NUM_ROWS-2 and -1 have no id


def tables():
    generator = np.random.default_rng(0)
    vectors_VE = generator.standard_normal((NUM_ROWS, 8)).astype(np.float32)
    vectors_VE[5] = 0
    strings = StringVocabulary.from_ids([f"id {generator.integers(10**9)}" for _ in range(NUM_ROWS)])
    numbers = Int64Vocabulary.from_ids(generator.permutation(NUM_ROWS) * 7 - 900)
    shared = Int64Vocabulary.from_pairs(range(NUM_ROWS), SHARED)
    return {
        "plain": dpq_contents(NUM_ROWS, LAYOUT, vocabulary=numbers),
        "residual": dpq_contents(NUM_ROWS, RESIDUAL, subspace_dim=4, vocabulary=strings, dtype=np.float16),
        "shared-values": dpq_contents(NUM_ROWS, RESIDUAL, subspace_dim=4, shared=True),
        "shared-rows": dpq_contents(NUM_ROWS, LAYOUT, vocabulary=shared),
        "hashed": dpq_contents(NUM_ROWS, LAYOUT, vocabulary=ModuloVocabulary(NUM_ROWS)),
        "dense": dense_contents(vectors_VE, StringVocabulary.from_pairs([f"{i}" for i in range(NUM_ROWS)], SHARED)),
        "one-row": dpq_contents(1, LAYOUT),
        "tiers": tiered(),
    }


def tiered():
    layout = CodeLayout(num_subspaces=2, num_codes=5, num_levels=3)
    contents = dpq_contents(NUM_ROWS, layout, subspace_dim=4)
    tiers = cut_into_tiers(layout, NUM_ROWS, ((0.1, 2), (0.5, 1)))
    generator = np.random.default_rng(1)
    chunks = [
        pack_codes(generator.integers(0, 5, (tier.num_rows, tier.layout.codes_per_row)), tier.layout) for tier in tiers
    ]
    return dataclasses.replace(contents, tiers=tiers, chunks=chunks)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return EmbeddingStore.open(write_artifact(tmp_path_factory.mktemp("search") / "artifact", tables()))


def brute_force(store, name, query_E, similarity):
    """Every id of the table with its score, the best first; one id of those that share a row."""
    ids, rows = store.table(name).vocabulary.ids_of_rows(0, store.table(name).manifest.num_embeddings)
    lowest = {}
    for an_id, row in zip(ids.tolist(), rows.tolist(), strict=True):
        lowest[row] = min(an_id, lowest.get(row, an_id))
    vectors_NE = store.lookup(name, list(lowest.values())).vectors.astype(np.float64)
    scores_N = vectors_NE @ query_E.astype(np.float64)
    if similarity == "cosine":
        lengths_N = np.linalg.norm(vectors_NE, axis=1) * np.linalg.norm(query_E.astype(np.float64))
        scores_N = np.divide(scores_N, lengths_N, out=np.zeros_like(scores_N), where=lengths_N > 0)
    return dict(sorted(zip(lowest.values(), scores_N.tolist(), strict=True), key=lambda pair: -pair[1]))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("name", list(tables()))
def test_search_is_brute_force_on_the_decoded_vectors(name, similarity, store):
    queries_QE = np.random.default_rng(3).standard_normal((4, 8)).astype(np.float32)
    ids, scores_QT = store.search(name, queries_QE, 20, similarity=similarity)
    for query_E, ids_T, scores_T in zip(queries_QE, ids, scores_QT, strict=True):
        expected = brute_force(store, name, query_E, similarity)
        ids_T = ids_T if isinstance(ids_T, list) else ids_T.tolist()
        assert len(ids_T) == len(set(ids_T)) == min(20, len(expected))
        np.testing.assert_allclose(scores_T, [expected[an_id] for an_id in ids_T], atol=1e-5)
        np.testing.assert_allclose(scores_T, list(expected.values())[: len(ids_T)], atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "tiers", "dense"])
def test_ties_go_to_the_lower_row(name, store):
    """A query of zeros: all rows tie."""
    table = store.table(name)
    ids, scores_QT = store.search(name, np.zeros((1, 8)), 30)
    assert table.vocabulary.rows(ids[0]).tolist() == list(range(30))
    assert not scores_QT.any()


@given(k=st.integers(1, 400), seed=st.integers(0, 3))
def test_more_answers_begin_with_fewer(store, k, seed):
    query_1E = np.random.default_rng(seed).standard_normal((1, 8))
    for name in ("shared-rows", "residual", "tiers"):
        few, all_of_them = store.search(name, query_1E, k), store.search(name, query_1E, 10**6)
        assert list(few.ids[0]) == list(all_of_them.ids[0])[:k]
        np.testing.assert_array_equal(few.scores[0], all_of_them.scores[0, :k])


def test_a_row_of_several_ids_has_its_lowest_and_a_row_of_none_is_no_answer(store):
    ids, _ = store.search("shared-rows", np.ones((1, 8)), NUM_ROWS)
    assert sorted(ids[0].tolist()) == [0, 1, *range(4, NUM_ROWS)]


def test_an_id_finds_itself_by_cosine(store):
    for name in ("plain", "residual", "dense"):
        some = store.search(name, np.ones((1, 8)), 1).ids[0]
        ids, scores_QT = store.search(name, store.lookup(name, list(some)).vectors, 1, similarity="cosine")
        assert scores_QT[0, 0] == pytest.approx(1)
        vectors = store.lookup(name, [*some, *ids[0]]).vectors
        np.testing.assert_array_equal(vectors[0], vectors[1])  # maybe by another id of the same codes


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("name", ["plain", "dense"])
def test_tables_are_searched_piece_by_piece(name, similarity, store, monkeypatch):
    query_1E = np.random.default_rng(5).standard_normal((1, 8))
    whole = store.search(name, query_1E, 40, similarity=similarity)
    monkeypatch.setattr(search, "_BLOCK_NUMBERS", 8 * 7)
    again = EmbeddingStore(store.artifact).search(name, query_1E, 40, similarity=similarity)
    assert list(again.ids[0]) == list(whole.ids[0])
    np.testing.assert_allclose(again.scores, whole.scores, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "dense", "one-row"])
def test_short_queries_have_a_direction(name, store):
    query_1E = np.random.default_rng(5).standard_normal((1, 8)).astype(np.float32)
    long, short = (store.search(name, query_1E * size, 5, similarity="cosine") for size in (1, 1e-30))
    assert list(long.ids[0]) == list(short.ids[0])
    np.testing.assert_allclose(short.scores, long.scores, rtol=1e-4)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("kind", ["codes", "vectors"])
def test_an_empty_table_has_no_answers(kind, similarity, tmp_path):
    contents = dpq_contents(0, LAYOUT) if kind == "codes" else dense_contents(np.empty((0, 8), np.float32))
    empty = EmbeddingStore.open(write_artifact(tmp_path / "empty", {"item": contents}))
    ids, scores_QT = empty.search("item", np.ones((2, 8)), 3, similarity=similarity)
    assert np.shape(ids) == scores_QT.shape == (2, 0)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["vectors", "values", "shared values", "levels"])
def test_search_names_the_number_of_a_table_that_is_not_finite_and_does_not_blame_the_queries(
    kind, number, similarity, tmp_path
):
    contents = {
        "vectors": dense_contents(np.ones((3, 8), np.float32)),
        "values": dpq_contents(3, LAYOUT),
        "shared values": dpq_contents(3, LAYOUT, shared=True),
        "levels": dpq_contents(3, RESIDUAL, subspace_dim=4),
    }[kind]
    if kind == "vectors":
        contents.chunks[0][2, 5] = number
        place = r"vectors\[2, 5\]"
    else:
        contents.values[0, 3, 1] = number
        place = r"values\[0, 3, 1\]"
    broken = EmbeddingStore.open(write_unchecked(tmp_path / "broken", {"item": contents}))
    with pytest.raises(DamagedArtifactError, match=f"table 'item': {place} is {number}"):
        broken.search("item", np.ones((1, 8)), 2, similarity=similarity)


def test_search_finds_what_is_not_finite_beyond_the_first_block_of_a_dense_table(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_BLOCK_NUMBERS", 16)
    vectors_VE = np.ones((9, 8), np.float32)
    vectors_VE[7, 1] = np.inf
    broken = EmbeddingStore.open(write_unchecked(tmp_path / "broken", {"item": dense_contents(vectors_VE)}))
    with pytest.raises(DamagedArtifactError, match=r"vectors\[7, 1\] is inf"):
        broken.search("item", np.ones((1, 8)), 2)


def test_lookup_of_a_table_that_holds_what_is_not_finite_gives_its_numbers(tmp_path):
    vectors_VE = np.array([[1, np.nan], [2, np.inf]], np.float32)
    broken = EmbeddingStore.open(write_unchecked(tmp_path / "broken", {"item": dense_contents(vectors_VE)}))
    np.testing.assert_array_equal(broken.lookup("item", [1, 0]).vectors, vectors_VE[::-1])


def test_no_queries_have_no_answers(store):
    ids, scores_QT = store.search("plain", np.empty((0, 8)), 3)
    assert ids.shape == scores_QT.shape == (0, 3)


@pytest.mark.parametrize(
    ("queries", "k", "similarity", "message"),
    [
        (np.ones(8), 1, "dot", r"queries: got shape \(8,\), want \[Q, 8\]"),
        (np.ones((1, 7)), 1, "dot", r"queries: got shape \(1, 7\), want \[Q, 8\]"),
        ([["a"] * 8], 1, "dot", "queries: got something else than numbers"),
        ([[10**400] * 8], 1, "dot", "queries: got something else than numbers"),
        ([[3e38] * 8], 1, "dot", "queries: their scores are more than 32 bits hold"),
        ([[np.nan] * 8], 1, "dot", "queries: got NaN or infinity, want finite"),
        ([[1e300] * 8], 1, "dot", "queries: got NaN or infinity, want finite"),
        (np.ones((1, 8)), 0, "dot", "k: got 0, want 1 or more"),
        (np.ones((1, 8)), 2.5, "dot", r"k: got 2\.5, want 1 or more"),
        (np.ones((1, 8)), 1, "l2", "similarity: got 'l2', want dot or cosine"),
    ],
)
def test_search_refuses_what_makes_no_sense(queries, k, similarity, message, store):
    with pytest.raises(ConfigError, match=message):
        store.search("plain", queries, k, similarity=similarity)


def test_search_names_a_table_that_there_is_not(store):
    with pytest.raises(UnknownTableError, match="table 'item' is not in this artifact"):
        store.search("item", np.ones((1, 8)), 1)
