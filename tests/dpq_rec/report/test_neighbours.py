"""Nearest rows, held to scikit-learn's cosines of the whole table."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from dpq_rec import CodeLayout, DamagedArtifactError, open_artifact, write_artifact
from dpq_rec.report import facts as module
from dpq_rec.report.facts import nearest_rows, telling_rows
from tests.dpq_rec.builders import dense_contents, dpq_contents, overwrite, write_unchecked


def opened(path, contents):
    return open_artifact(write_unchecked(path, {"t": contents})).tables["t"]


def random_dense(num_rows=200, embedding_dim=6):
    return dense_contents(np.random.default_rng(3).standard_normal((num_rows, embedding_dim)).astype(np.float32))


CONTENTS = {
    "dense": random_dense(),
    "dpq": dpq_contents(200, CodeLayout(num_subspaces=3, num_codes=20)),
    "ties": dpq_contents(200, CodeLayout(num_subspaces=1, num_codes=3)),
    "levels": dpq_contents(200, CodeLayout(num_subspaces=2, num_codes=7, num_levels=2), shared=True),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("block_numbers", [6, 100, 1 << 20])
def test_nearest_rows_are_those_of_all_cosines_sorted(tmp_path, monkeypatch, kind, block_numbers):
    monkeypatch.setattr(module, "_BLOCK_NUMBERS", block_numbers)
    table = opened(tmp_path / "a", CONTENTS[kind])
    rows_Q = np.array([0, 17, 199, 17])
    vectors_VE = table.decode(np.arange(200)).astype(np.float64)
    cosines_QV = np.round(cosine_similarity(vectors_VE[rows_Q], vectors_VE), 6)
    told = []
    found = nearest_rows(table, rows_Q, 9, told.append)
    for q, (row, (rows_T, cosines_T)) in enumerate(zip(rows_Q.tolist(), found, strict=True)):
        others = [v for v in range(200) if v != row]
        wanted = sorted(others, key=lambda v, q=q: (-cosines_QV[q, v], v))[:9]
        assert cosines_T == pytest.approx(cosines_QV[q, wanted], abs=2e-6)
        assert cosines_T == pytest.approx(cosines_QV[q, rows_T], abs=2e-6)
        if kind == "ties":
            assert rows_T.tolist() == wanted
        assert row not in rows_T
    assert sum(told) == 200


def test_nearest_rows_are_fewer_where_the_table_has_no_more(tmp_path):
    ((rows_T, _),) = nearest_rows(opened(tmp_path / "a", random_dense(3)), np.array([1]), 9)
    assert sorted(rows_T.tolist()) == [0, 2]


def test_nearest_rows_of_a_table_of_one_row_and_of_no_rows_asked_for_are_none(tmp_path):
    one = opened(tmp_path / "a", random_dense(1))
    assert [len(rows_T) for rows_T, _ in nearest_rows(one, np.array([0]), 9)] == [0]
    assert nearest_rows(one, np.array([], np.int64), 9) == []


def test_nearest_rows_take_vectors_without_a_direction_for_unrelated(tmp_path):
    vectors_VE = np.array([[1, 0], [0, 0], [np.nan, 1], [1, 1], [-1, 0], [np.inf, 0]], np.float32)
    table = opened(tmp_path / "a", dense_contents(vectors_VE))
    found = nearest_rows(table, np.array([0, 1]), 5)
    assert [rows_T.tolist() for rows_T, _ in found] == [[3, 1, 2, 5, 4], [0, 2, 3, 4, 5]]
    assert found[0][1] == pytest.approx([np.sqrt(0.5), 0, 0, 0, -1], abs=1e-6)


def test_nearest_rows_see_the_direction_of_vectors_whose_squares_overflow_float32(tmp_path):
    vectors_VE = np.array([[1e30, 1e30], [-1, 1], [1e-30, 1.1e-30]], np.float32)
    ((rows_T, cosines_T),) = nearest_rows(opened(tmp_path / "a", dense_contents(vectors_VE)), np.array([0]), 1)
    assert (rows_T.tolist(), cosines_T[0] > 0.99) == ([2], True)


def test_nearest_rows_of_a_damaged_table_say_so(tmp_path):
    path = write_artifact(tmp_path / "a", {"t": dpq_contents(9, CodeLayout(num_subspaces=5, num_codes=5))})
    overwrite(path, "t", "packed_codes", 8, b"\xff")
    with pytest.raises(DamagedArtifactError, match="row 4 holds a code of 5 or more"):
        nearest_rows(open_artifact(path).tables["t"], np.array([0]), 3)


def test_telling_rows_pass_over_those_that_say_the_same(tmp_path):
    vectors_VE = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, 0], [0, -1]], np.float32)
    table = opened(tmp_path / "a", dense_contents(vectors_VE))
    assert telling_rows(table, np.arange(6), 4).tolist() == [0, 2, 4, 5]  # the median cosine is 0
    assert telling_rows(table, np.array([2, 3, 5]), 4).tolist() == [2, 5]
    assert telling_rows(table, np.arange(6), 1).tolist() == [0]
    assert telling_rows(table, np.arange(0), 4).tolist() == []
