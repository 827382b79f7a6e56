import subprocess
import sys

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import CodeLayout, DamagedArtifactError, kernels, pack_codes
from dpq_rec.kernels import MISSING_ROW, Coded
from tests import references
from tests.dpq_rec.builders import random_codes, random_values

WIDTHS = [1, 2, 3, 4, 5, 8, 16, 20, 32]


def problem(layout, subspace_dim, *, num_rows=37, num_ids=101, shared=False, seed=0):
    """Packed codes, values and rows to decode: random ones, missing ones, the first and the last."""
    rows_N = np.random.default_rng(seed).integers(-1, num_rows, num_ids)
    rows_N[-3:] = [num_rows - 1, 0, MISSING_ROW]
    packed_VW = pack_codes(random_codes(num_rows, layout, seed), layout)
    return packed_VW, random_values(layout, subspace_dim, shared=shared, seed=seed), rows_N


def assert_decodes_as_the_reference(layout, packed_VW, values_MKS, rows_N):
    stored = Coded.of(packed_VW, values_MKS, layout)
    vectors_NE = kernels.decode(stored, rows_N)
    wanted_NE = references.decode(stored, rows_N)
    assert (vectors_NE.dtype, vectors_NE.shape) == (np.float32, wanted_NE.shape)
    assert vectors_NE.tobytes() == wanted_NE.tobytes()


@pytest.mark.parametrize("subspace_dim", WIDTHS)
@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_codes", [5, 16, 256])
def test_decode_equals_the_reference_in_every_width(subspace_dim, num_levels, shared, num_codes):
    layout = CodeLayout(num_subspaces=3, num_codes=num_codes, num_levels=num_levels)
    assert_decodes_as_the_reference(layout, *problem(layout, subspace_dim, shared=shared))


@pytest.mark.parametrize("num_codes", [2, 3, 31, 32, 127, 200, 256, 257, 1000, 4096, 65_535, 65_536])
@pytest.mark.parametrize("num_subspaces", [1, 2, 7, 16])
def test_decode_equals_the_reference_for_every_number_of_codes(num_codes, num_subspaces):
    layout = CodeLayout(num_subspaces=num_subspaces, num_codes=num_codes)
    assert_decodes_as_the_reference(layout, *problem(layout, 2))


@given(
    st.builds(
        CodeLayout,
        num_subspaces=st.integers(1, 40),
        num_codes=st.one_of(st.integers(2, 300), st.integers(2, 5_000)),
        num_levels=st.integers(1, 4),
    ),
    st.integers(1, 24),
    st.booleans(),
    st.integers(1, 9),
    st.integers(3, 60),
)
def test_decode_equals_the_reference_in_any_shape(layout, subspace_dim, shared, num_rows, num_ids):
    shape = problem(layout, subspace_dim, num_rows=num_rows, num_ids=num_ids, shared=shared)
    assert_decodes_as_the_reference(layout, *shape)


def test_decode_of_a_row_worked_out_by_hand():
    layout = CodeLayout(num_subspaces=2, num_codes=2, num_levels=2)
    values_MKS = np.array([[[1.0], [2.0]], [[10.0], [20.0]], [[100.0], [200.0]], [[1000.0], [2000.0]]], np.float32)
    packed_VW = pack_codes(np.array([[0, 0, 0, 0], [1, 0, 0, 1]]), layout)
    assert kernels.decode(Coded.of(packed_VW, values_MKS, layout), np.array([1])).tolist() == [[102.0, 2010.0]]


def test_decode_adds_levels_in_order():
    layout = CodeLayout(num_subspaces=1, num_codes=2, num_levels=3)
    values_MKS = np.array([[[1e8], [0]], [[-1e8], [0]], [[1], [0]]], np.float32)  # 1e8 + (-1e8 + 1) would be 0
    assert kernels.decode(Coded.of(np.zeros((1, 1), np.uint8), values_MKS, layout), np.array([0])).tolist() == [[1.0]]


def test_decode_keeps_every_bit_of_a_value():
    layout = CodeLayout(num_subspaces=2, num_codes=4)
    bits = np.array([0x80000000, 0x7FC00001, 0x7F800000, 0x00000001, 0xFF800000, 0x3F800001, 0, 0x807FFFFF], np.uint32)
    codes_NM = np.array([[0, 3], [1, 2], [2, 1], [3, 0]])
    decoded = kernels.decode(
        Coded.of(pack_codes(codes_NM, layout), bits.view(np.float32).reshape(2, 4, 1), layout), np.arange(4)
    )
    assert decoded.view(np.uint32).tolist() == [[int(bits[a]), int(bits[4 + b])] for a, b in codes_NM]


def test_decode_of_no_rows_is_no_vectors():
    layout = CodeLayout(num_subspaces=3, num_codes=5)
    packed_VW, values_MKS, _ = problem(layout, 4)
    assert kernels.decode(Coded.of(packed_VW, values_MKS, layout), np.empty(0, np.int64)).shape == (0, 12)


def test_decode_of_missing_rows_is_zeros_even_in_an_empty_table():
    layout = CodeLayout(num_subspaces=3, num_codes=5)
    vectors_NE = kernels.decode(
        Coded.of(np.empty((0, layout.row_bytes), np.uint8), random_values(layout, 4), layout), np.full(40, MISSING_ROW)
    )
    assert (vectors_NE == np.zeros((40, 12))).all()


@pytest.mark.parametrize("num_codes", [5, 200, 256])
@pytest.mark.parametrize("row", [-2, 37, 38, 2**31, 2**62, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("at", [0, 50, 100])
def test_decode_raises_for_a_row_outside_the_table(num_codes, row, at):
    layout = CodeLayout(num_subspaces=3, num_codes=num_codes)
    packed_VW, values_MKS, rows_N = problem(layout, 4)
    rows_N[at] = row
    with pytest.raises(DamagedArtifactError, match=f"row {row} is outside the table's 37 rows"):
        kernels.decode(Coded.of(packed_VW, values_MKS, layout), rows_N)


@pytest.mark.parametrize("num_levels", [1, 2])
@pytest.mark.parametrize("num_codes", [3, 5, 200, 257, 65_535])
def test_decode_raises_for_a_code_that_cannot_be_wherever_it_stands(num_codes, num_levels):
    layout = CodeLayout(num_subspaces=3, num_codes=num_codes, num_levels=num_levels)
    wider = CodeLayout(num_subspaces=3, num_codes=1 << layout.code_bits, num_levels=num_levels)
    values_MKS = random_values(layout, 4)
    for m in range(layout.codes_per_row):
        codes_NM = random_codes(9, layout)
        codes_NM[6, m] = num_codes
        with pytest.raises(DamagedArtifactError, match=f"row 6 holds a code of {num_codes} or more"):
            kernels.decode(Coded.of(pack_codes(codes_NM, wider), values_MKS, layout), np.arange(9))


# Packed codes and values end where readable memory ends: to read a byte beyond either is to crash.
AT_THE_END_OF_MEMORY = """
import numpy as np
from dpq_rec import CodeLayout, DamagedArtifactError, kernels
from dpq_rec.kernels import Coded
from dpq_rec.kernels.lookup import JsonTexts, decode_to_json
from tests import references
from tests.dpq_rec.kernels.end_of_memory import at_the_end

generator = np.random.default_rng(0)
decoded = refused = 0
for num_codes in (2, 3, 5, 16, 31, 64, 200, 256, 257, 2048, 40_000, 65_536):
    for num_subspaces in (1, 2, 3, 5, 8, 33):
        for num_levels in (1, 2):
            layout = CodeLayout(num_subspaces=num_subspaces, num_codes=num_codes, num_levels=num_levels)
            values = generator.standard_normal((layout.codes_per_row, num_codes, 1)).astype(np.float32)
            bytes_ = generator.integers(0, 256, (6, layout.row_bytes), np.uint8)
            bytes_[::2] = 0
            packed, values, rows = at_the_end(bytes_), at_the_end(values), np.arange(6)
            stored, texts = Coded.of(packed, values, layout), None
            if num_levels == 1 and num_codes <= 2048:
                texts = JsonTexts.of(stored, np.float32, lambda numbers: ",".join(map(str, numbers)).encode())
            for row in range(6):
                try:
                    vectors = kernels.decode(stored, rows[row:])
                except DamagedArtifactError:
                    refused += 1
                else:
                    decoded += 1
                    assert vectors.tobytes() == references.decode(stored, rows[row:]).tobytes()
                if texts is None:
                    continue
                try:
                    text = decode_to_json(stored, texts, rows[row:])
                except DamagedArtifactError:
                    refused += 1
                else:
                    assert text == references.decode_to_json(stored, texts, rows[row:])
            for wild in (-2, 6, 2**40, -(2**63)):
                try:
                    kernels.decode(stored, np.array([0] * 3_000 + [wild]), num_threads=2)
                except DamagedArtifactError:
                    refused += 1
                else:
                    raise AssertionError(wild)
print("decoded", decoded, "refused", refused)
"""


def test_decode_reads_nothing_outside_the_arrays_whatever_the_bytes():
    done = subprocess.run([sys.executable, "-c", AT_THE_END_OF_MEMORY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    _, decoded, _, refused = done.stdout.split()
    assert int(decoded) > 100
    assert int(refused) > 100


@pytest.mark.parametrize("code_bits", [4, 5, 6, 8, 10, 12])
def test_decode_equals_faiss(code_bits):
    layout = CodeLayout(num_subspaces=6, num_codes=1 << code_bits)
    packed_VW, values_MKS, _ = problem(layout, 4, num_rows=50)
    quantizer = faiss.ProductQuantizer(24, 6, code_bits)
    faiss.copy_array_to_vector(values_MKS.ravel(), quantizer.centroids)
    decoded_VE = kernels.decode(Coded.of(packed_VW, values_MKS, layout), np.arange(50))
    assert decoded_VE.tobytes() == quantizer.decode(packed_VW).tobytes()


@pytest.mark.parametrize("code_bits", [4, 5, 6, 8, 10, 12])
def test_pack_codes_has_the_bit_order_of_faiss(code_bits):
    layout = CodeLayout(num_subspaces=6, num_codes=1 << code_bits)
    values_MKS = random_values(layout, 4)
    quantizer = faiss.ProductQuantizer(24, 6, code_bits)
    faiss.copy_array_to_vector(values_MKS.ravel(), quantizer.centroids)
    codes_NM = random_codes(20, layout)
    vectors_NE = values_MKS[np.arange(6), codes_NM].reshape(20, 24)
    np.testing.assert_array_equal(quantizer.compute_codes(vectors_NE), pack_codes(codes_NM, layout))
