"""Rank and singular values, held to numpy's on the whole table."""

import numpy as np
import pytest

from dpq_rec import CodeLayout, open_artifact
from dpq_rec.report import facts as module
from dpq_rec.report.facts import spectrum, spread_rows
from tests.dpq_rec.builders import dense_contents, dpq_contents, write_unchecked


def opened(path, contents):
    return open_artifact(write_unchecked(path, {"t": contents})).tables["t"]


def low_rank(num_rows, embedding_dim, rank):
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((num_rows, rank)), generator.standard_normal((rank, embedding_dim))
    return (left @ right).astype(np.float32)


@pytest.mark.parametrize(("num_rows", "rank"), [(500, 5), (500, 16), (7, 7), (3, 2), (1, 1)])
def test_spectrum_has_the_rank_that_numpy_finds_in_a_dense_table(tmp_path, num_rows, rank):
    vectors_VE = low_rank(num_rows, 16, rank)
    found = spectrum(opened(tmp_path / "a", dense_contents(vectors_VE)))
    assert found.rank == np.linalg.matrix_rank(vectors_VE) == rank
    assert found.num_rows == num_rows


@pytest.mark.parametrize(
    "layout",
    [
        CodeLayout(num_subspaces=8, num_codes=16),
        CodeLayout(num_subspaces=1, num_codes=2),
        CodeLayout(num_subspaces=2, num_codes=4, num_levels=2),
    ],
)
def test_spectrum_is_that_of_all_decoded_rows(tmp_path, layout):
    table = opened(tmp_path / "a", dpq_contents(300, layout, subspace_dim=5))
    vectors_VE = table.decode(np.arange(300))
    found = spectrum(table)
    assert found.rank == np.linalg.matrix_rank(vectors_VE)
    wanted_R = np.linalg.svd(vectors_VE.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(found.singular_values_R, wanted_R, atol=1e-9 * wanted_R[0])


def test_spectrum_of_few_codes_is_not_of_full_rank(tmp_path):
    """K * D < E, so that theorem 1 does not hold. A group's one-hot codes add up to 1: there are D * (K - 1) + 1."""
    table = opened(tmp_path / "a", dpq_contents(500, CodeLayout(num_subspaces=2, num_codes=3), subspace_dim=10))
    assert spectrum(table).rank == np.linalg.matrix_rank(table.decode(np.arange(500))) == 5


def test_spectrum_of_a_sample_has_the_rank_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SAMPLE_NUMBERS", 16 * 100)
    vectors_VE = low_rank(5000, 16, 9)
    found = spectrum(opened(tmp_path / "a", dense_contents(vectors_VE)))
    assert (found.num_rows, found.rank) == (100, np.linalg.matrix_rank(vectors_VE))


def test_spectrum_counts_directions_that_hold_a_share_of_the_squared_length(tmp_path):
    vectors_VE = np.diag(np.array([3, 2, 1, 0], np.float32))  # squared lengths of 9, 4 and 1
    found = spectrum(opened(tmp_path / "a", dense_contents(vectors_VE)))
    assert [found.directions_of(share) for share in (0.5, 0.7, 0.9, 0.99)] == [1, 2, 2, 3]
    assert found.rank == 3


def test_spectrum_of_numbers_that_are_not_finite_is_none(tmp_path):
    assert spectrum(opened(tmp_path / "a", dense_contents(np.array([[1, np.inf]], np.float32)))) is None


def test_spectrum_of_no_rows_and_of_zeros_has_rank_0(tmp_path):
    for name, num_rows in (("a", 0), ("b", 3)):
        assert spectrum(opened(tmp_path / name, dense_contents(np.zeros((num_rows, 2), np.float32)))).rank == 0


@pytest.mark.parametrize(("num_rows", "most"), [(10, 10), (11, 10), (1_000_003, 1000), (3, 10), (0, 10)])
def test_spread_rows_takes_one_row_of_each_range(num_rows, most):
    rows_N = spread_rows(num_rows, most)
    assert len(rows_N) == min(num_rows, most)
    assert (np.diff(rows_N) > 0).all()
    if num_rows > most:
        np.testing.assert_array_equal(rows_N.tolist(), spread_rows(num_rows, most))
        assert ((rows_N * most) // num_rows >= np.arange(most) - 1).all()
        assert ((rows_N * most) // num_rows <= np.arange(most)).all()
