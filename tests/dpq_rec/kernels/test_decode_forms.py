"""Decoding in fp16, of dense vectors and of tiers, and on several threads. How codes are read: test_decode."""

import concurrent.futures
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import CodeLayout, DamagedArtifactError, kernels, pack_codes
from dpq_rec.kernels import MISSING_ROW, Coded
from tests import references
from tests.dpq_rec.builders import random_codes, random_values

# Ties, both ways; the last subnormal and the first normal one; what rounds to zero, to infinity and to just below it.
HARD_TO_ROUND = [
    *(1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-20, 2.0**-24, 2.0**-25, 2.0**-25 + 2.0**-40),
    *(3 * 2.0**-25, 2.0**-14 - 2.0**-25, 2.0**-14, 65_504, 65_519.996, 65_520, 1e-40, 0.0, np.inf, 1 / 3),
]


def coded(layout, num_rows, subspace_dim, shares=(), *, shared=False, seed=0):
    """Tiers that end at shares of the rows, each with a level less than the one before."""
    ends, layouts, packed, first = [*(round(share * num_rows) for share in shares), num_rows], [], [], 0
    for fewer, end in enumerate(ends):
        of_tier = CodeLayout(
            num_subspaces=layout.num_subspaces, num_codes=layout.num_codes, num_levels=layout.num_levels - fewer
        )
        layouts.append(of_tier)
        packed.append(pack_codes(random_codes(end - first, of_tier, seed + fewer), of_tier))
        first = end
    return Coded(layouts, packed, random_values(layout, subspace_dim, shared=shared, seed=seed))


def some_rows(num_rows, num_ids, seed=0):
    rows_N = np.random.default_rng(seed).integers(-1, num_rows, num_ids)
    rows_N[-3:] = [num_rows - 1, 0, MISSING_ROW]
    return rows_N


def assert_decodes_as_the_reference(stored, rows_N, **options):
    vectors_NE, wanted_NE = kernels.decode(stored, rows_N, **options), references.decode(stored, rows_N, **options)
    assert (vectors_NE.dtype, vectors_NE.shape) == (wanted_NE.dtype, wanted_NE.shape)
    assert vectors_NE.tobytes() == wanted_NE.tobytes()


layouts = st.builds(
    CodeLayout,
    num_subspaces=st.integers(1, 20),
    num_codes=st.one_of(st.integers(2, 300), st.integers(1, 16).map(lambda bits: 1 << bits)),
    num_levels=st.integers(1, 4),
)
dtypes = st.sampled_from([np.float32, np.float16])
threads = st.integers(1, 3)


@given(layouts, st.integers(1, 40), st.booleans(), st.integers(3, 60), dtypes, threads)
def test_decode_equals_the_reference_in_both_types(layout, subspace_dim, shared, num_ids, dtype, num_threads):
    stored = coded(layout, 9, subspace_dim, shared=shared)
    assert_decodes_as_the_reference(stored, some_rows(9, num_ids), dtype=dtype, num_threads=num_threads)


@given(layouts, st.integers(1, 9), st.booleans(), st.integers(1, 40), st.data(), dtypes)
def test_decode_of_tiers_equals_the_reference(layout, subspace_dim, shared, num_rows, data, dtype):
    percents = data.draw(st.lists(st.integers(0, 100), max_size=layout.num_levels - 1).map(sorted))
    stored = coded(layout, num_rows, subspace_dim, [p / 100 for p in percents], shared=shared)
    rows_N = np.concatenate([np.arange(-1, num_rows), some_rows(num_rows, 50)])
    assert_decodes_as_the_reference(stored, rows_N, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 15, 16, 17, 32, 50, 64, 100])
def test_decode_of_dense_vectors_equals_the_reference(dim, dtype):
    vectors_VE = np.random.default_rng(dim).standard_normal((37, dim)).astype(np.float32)
    assert_decodes_as_the_reference(vectors_VE, some_rows(37, 101), dtype=dtype)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("is_dense", [False, True])
def test_decode_rounds_to_float16_as_numpy_does(width, is_dense):
    numbers = np.array([*HARD_TO_ROUND, *(-number for number in HARD_TO_ROUND)], np.float32)
    values_MKS = np.resize(numbers, (1, 32, width))
    stored = Coded.of(np.arange(32, dtype=np.uint8)[:, None], values_MKS, CodeLayout(num_subspaces=1, num_codes=256))
    stored = values_MKS[0] if is_dense else dataclasses.replace(stored, values_MKS=np.resize(numbers, (1, 256, width)))
    with np.errstate(over="ignore"):
        wanted = values_MKS[0].astype(np.float16)
    assert kernels.decode(stored, np.arange(32), dtype=np.float16).tobytes() == wanted.tobytes()


def test_decode_keeps_what_is_no_number_in_float16():
    bits = np.array([[0x7FC00001], [0xFFC00000], [0x7F800001]], np.uint32)  # the last one signals
    assert np.isnan(kernels.decode(bits.view(np.float32), np.arange(3), dtype=np.float16)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("num_threads", [2, 3, 64])
@pytest.mark.parametrize("is_dense", [False, True])
def test_decode_is_the_same_on_several_threads(num_threads, is_dense, dtype):
    stored = coded(CodeLayout(num_subspaces=5, num_codes=31, num_levels=2), 700, 3, [0.5])
    stored = kernels.decode(stored, np.arange(700)) if is_dense else stored
    for num_ids in (3, 1024, 1025, 20_000):
        rows_N = some_rows(700, num_ids)
        alone = kernels.decode(stored, rows_N, dtype=dtype)
        assert kernels.decode(stored, rows_N, dtype=dtype, num_threads=num_threads).tobytes() == alone.tobytes()


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("row", [-2, 700, 2**62, -(2**63)])
def test_decode_names_the_first_damage_whatever_the_threads(num_threads, row):
    layout = CodeLayout(num_subspaces=3, num_codes=5)
    codes_NM = random_codes(700, layout)
    codes_NM[6, 2] = 7
    stored = Coded.of(pack_codes(codes_NM, CodeLayout(num_subspaces=3, num_codes=8)), random_values(layout, 4), layout)
    rows_N = np.arange(20_000) % 6
    rows_N[[5_000, 9_000]] = row, 6
    with pytest.raises(DamagedArtifactError, match=f"row {row} is outside the table's 700 rows"):
        kernels.decode(stored, rows_N, num_threads=num_threads)
    rows_N[[5_000, 9_000]] = 6, row
    with pytest.raises(DamagedArtifactError, match="row 6 holds a code of 5 or more"):
        kernels.decode(stored, rows_N, num_threads=num_threads)


@pytest.mark.parametrize("row", [-2, 37, 2**62, -(2**63)])
def test_decode_raises_for_a_row_outside_a_dense_table(row):
    with pytest.raises(DamagedArtifactError, match=f"row {row} is outside the table's 37 rows"):
        kernels.decode(np.zeros((37, 5), np.float32), np.array([3] * 30 + [row]))


def test_decode_shares_its_threads_between_callers():
    stored = coded(CodeLayout(num_subspaces=4, num_codes=256), 5_000, 4)
    row_lists = [some_rows(5_000, 6_000, seed) for seed in range(24)]
    alone = [kernels.decode(stored, rows_N) for rows_N in row_lists]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda rows_N: kernels.decode(stored, rows_N, num_threads=3), row_lists))
    assert [one.tobytes() for one in together] == [one.tobytes() for one in alone]


FORKED = """
import os, numpy as np
from dpq_rec import kernels

def count_threads():
    return len(os.listdir("/proc/self/task"))

vectors_VE, rows_N = np.ones((9, 4), np.float32), np.arange(9_000) % 9
assert kernels.decode(vectors_VE, rows_N, num_threads=3).all()
child = os.fork()
if child == 0:
    alone = count_threads()
    decoded = kernels.decode(vectors_VE, rows_N, num_threads=3).all()
    os._exit(0 if decoded and count_threads() == alone + 2 else 1)
assert os.waitpid(child, 0)[1] == 0
assert kernels.decode(vectors_VE, rows_N, num_threads=3).all()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux lists them")
def test_decode_has_threads_of_its_own_in_a_forked_process():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
