"""The scan held to its numpy twin, bit for bit, and to faiss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import CodeLayout, DamagedArtifactError, kernels, pack_codes
from tests import references


def random_table(num_rows, layout, seed, *, few=False):
    generator = np.random.default_rng(seed)
    codes_VM = generator.integers(0, 2 if few else layout.num_codes, (num_rows, layout.codes_per_row))
    scores_MK = generator.standard_normal((layout.codes_per_row, layout.num_codes)).astype(np.float32)
    return pack_codes(codes_VM, layout), scores_MK, (generator.random(num_rows) + 0.5).astype(np.float32)


def assert_same(got, wanted):
    for array, wanted_array in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(array, wanted_array)


@given(
    num_rows=st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 200, 500])),
    num_subspaces=st.sampled_from([1, 2, 3, 5, 8, 9, 16]),
    num_levels=st.integers(1, 3),
    num_codes=st.sampled_from([2, 3, 5, 16, 31, 64, 100, 128, 256, 1000, 65_536]),
    most=st.one_of(st.integers(0, 5), st.integers(0, 80)),
    few=st.booleans(),
    with_scales=st.booleans(),
    seed=st.integers(0, 9),
)
def test_scan_is_its_twin(num_rows, num_subspaces, num_levels, num_codes, most, few, with_scales, seed):
    """With few codes many rows tie."""
    layout = CodeLayout(num_subspaces=num_subspaces, num_codes=num_codes, num_levels=num_levels)
    packed_VW, scores_MK, scales_V = random_table(num_rows, layout, seed, few=few)
    scales = scales_V if with_scales else None
    got = kernels.scan_top(packed_VW, scores_MK, layout, most, scales_V=scales, first_row=7)
    assert_same(got, references.scan_top(packed_VW, scores_MK, layout, most, scales_V=scales, first_row=7))


@pytest.mark.parametrize("factor", [1e-45, 1e-38, 1e-20, 1e30])
@pytest.mark.parametrize("offset", [0, 1e4, -1e4])
def test_scan_is_its_twin_where_scores_are_hard_to_bound(factor, offset):
    """So small or so near each other that rounding decides; and one group alone of all that tells rows apart."""
    layout = CodeLayout(num_subspaces=6, num_codes=256)
    packed_VW, scores_MK, scales_V = random_table(1000, layout, 3)
    scores_MK[2:] *= 1e-3
    scores_MK = ((scores_MK + np.float32(offset)) * np.float32(factor)).astype(np.float32)
    scales_V[::3] = 0
    for scales in (None, scales_V):
        got = kernels.scan_top(packed_VW, scores_MK, layout, 5, scales_V=scales)
        assert_same(got, references.scan_top(packed_VW, scores_MK, layout, 5, scales_V=scales))


def test_scan_is_its_twin_where_scales_are_negative():
    layout = CodeLayout(num_subspaces=3, num_codes=16)
    packed_VW, scores_MK, scales_V = random_table(500, layout, 0)
    scores_MK[0, 0] = 1000  # bounds of the others are coarse then
    scales_V *= -1
    got = kernels.scan_top(packed_VW, scores_MK, layout, 5, scales_V=scales_V)
    assert_same(got, references.scan_top(packed_VW, scores_MK, layout, 5, scales_V=scales_V))


@pytest.mark.parametrize("num_codes", [256, 31])
@pytest.mark.parametrize("cut", [0, 1, 8, 50, 99, 100])
def test_scan_goes_on_from_the_part_before(cut, num_codes):
    layout = CodeLayout(num_subspaces=3, num_codes=num_codes)
    packed_VW, scores_MK, _ = random_table(100, layout, 0, few=True)
    before = kernels.scan_top(packed_VW[:cut], scores_MK, layout, 9)
    got = kernels.scan_top(packed_VW[cut:], scores_MK, layout, 9, first_row=cut, before=before)
    assert_same(got, kernels.scan_top(packed_VW, scores_MK, layout, 9))


def test_scan_reads_nothing_beyond_the_rows():
    """The bytes behind them are other rows' or no memory at all; here they would win."""
    layout = CodeLayout(num_subspaces=3, num_codes=31)
    scores_MK = np.zeros((3, 31), np.float32)
    scores_MK[:, 30] = 1
    packed_VW = pack_codes(np.array([[0, 0, 0]] * 11 + [[30, 30, 30]] * 9), layout)
    rows_T, scores_T = kernels.scan_top(packed_VW[:11], scores_MK, layout, 20)
    assert (len(rows_T), scores_T.max()) == (11, 0)


@pytest.mark.parametrize(("row", "num_rows"), [(0, 19), (7, 19), (8, 19), (18, 19), (1, 300), (100, 300), (299, 300)])
def test_scan_refuses_a_code_that_there_is_not(row, num_rows):
    """Its row would not be among the best."""
    layout = CodeLayout(num_subspaces=3, num_codes=5)
    packed_VW, scores_MK, _ = random_table(num_rows, layout, 0)
    scores_MK[0, 0] = -100
    packed_VW[row] = [0b111 << 3, 0]  # code 0 is 0, code 1 is 7
    with pytest.raises(DamagedArtifactError, match=f"row {100 + row} holds a code of 5 or more"):
        kernels.scan_top(packed_VW, scores_MK, layout, 3, first_row=100)


def test_scan_finds_what_faiss_finds():
    faiss = pytest.importorskip("faiss")
    generator = np.random.default_rng(0)
    vectors_VE = generator.standard_normal((3000, 16)).astype(np.float32)
    index = faiss.IndexPQ(16, 4, 8, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors_VE)
    index.add(vectors_VE)
    layout = CodeLayout(num_subspaces=4, num_codes=256)
    packed_VW = faiss.vector_to_array(index.codes).reshape(3000, 4)
    values_DKS = faiss.vector_to_array(index.pq.centroids).reshape(4, 256, 4)
    queries_QE = generator.standard_normal((5, 16)).astype(np.float32)
    scores_QT, rows_QT = index.search(queries_QE, 10)
    for query_E, scores_T, rows_T in zip(queries_QE, scores_QT, rows_QT, strict=True):
        scores_MK = np.einsum("ds,dks->dk", query_E.reshape(4, 4), values_DKS)
        got_rows_T, got_scores_T = kernels.scan_top(packed_VW, scores_MK, layout, 10)
        np.testing.assert_array_equal(got_rows_T, rows_T)
        np.testing.assert_allclose(got_scores_T, scores_T, rtol=1e-5)
