"""What the search is measured beside: the same table in faiss."""

import numpy as np
import pytest

from tests.benchmarks.library.decode import DecodeConfig, random_table
from tests.benchmarks.library.search import faiss_index
from tests.benchmarks.library.test_decode import bench


def table_of(tmp_path, num_codes, num_levels=1):
    sizes = {"num_embeddings": 200, "embedding_dim": 8, "num_subspaces": 4, "num_codes": num_codes}
    config = DecodeConfig(**sizes, num_levels=num_levels)
    return random_table(config, tmp_path / "artifact", np.random.default_rng(0))


@pytest.mark.parametrize("num_codes", [16, 32, 256])
def test_faiss_index_answers_as_the_search_does(tmp_path, num_codes):
    table = table_of(tmp_path, num_codes)
    query_1E = np.random.default_rng(1).standard_normal((1, 8)).astype(np.float32)
    ids, scores = table.search(query_1E, 5)
    scores_1T, rows_1T = faiss_index(table).search(query_1E, 5)
    np.testing.assert_array_equal(ids, rows_1T)
    np.testing.assert_allclose(scores, scores_1T, rtol=1e-5)


def test_faiss_has_no_residual_levels_and_no_codes_that_fill_part_of_their_bits(tmp_path):
    assert faiss_index(table_of(tmp_path / "levels", 16, 2)) is None
    assert faiss_index(table_of(tmp_path / "part", 20)) is None


def test_search_leaves_a_line_for_each_kind_of_queries(tmp_path):
    done = bench("search", "--num-embeddings", 300, "--num-rounds", 2, "--results", tmp_path / "search.jsonl")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "search.jsonl").read_text().splitlines()) == 2
    assert "faiss IndexPQ" in done.stdout
