"""Vectors as JSON, held to what orjson writes of the decoded vectors, byte for byte, and to plain numpy."""

import os
import subprocess
import sys

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import CodeLayout, DamagedArtifactError, kernels, pack_codes
from dpq_rec.kernels import MISSING_ROW, Coded
from dpq_rec.kernels.lookup import JsonTexts, decode_to_json
from tests import references
from tests.dpq_rec.builders import random_codes, random_values
from tests.dpq_rec.kernels.test_decode_forms import HARD_TO_ROUND, dtypes, some_rows

# Of many lengths and forms: no numbers, exponents, subnormal ones, the longest texts and the shortest.
HARD_TO_WRITE = [
    *(np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 1e-5, -1.1754944e-38, -1.2345678e-6, 1e-45, 16777216, 1e15, 1e16),
    *(3.4e38, -123456.79, 1 / 3, 0.1, -0.099975586),
    *HARD_TO_ROUND,
]


def write(numbers):
    return orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def coded(layout, subspace_dim, row_counts=(37,), *, shared=False, hard=0.0, seed=0):
    """Tiers of one level each; `hard` is the share of values that are hard to write."""
    values_MKS = random_values(layout, subspace_dim, shared=shared, seed=seed)
    generator = np.random.default_rng(seed)
    is_hard = generator.random(values_MKS.shape) < hard
    values_MKS[is_hard] = generator.choice(np.array(HARD_TO_WRITE, np.float32), is_hard.sum())
    packed, first = [], 0
    for num_rows in row_counts:
        codes_NM = random_codes(num_rows, layout, seed + first)
        packed.append(pack_codes(codes_NM, layout))
        first += num_rows
    return Coded([layout] * len(packed), packed, values_MKS)


def assert_writes_as_orjson(stored, rows_N, dtype=np.float32, **around):
    texts = JsonTexts.of(stored, dtype, write)
    text = decode_to_json(stored, texts, rows_N, **around)
    assert text == references.decode_to_json(stored, texts, rows_N, **around)
    between = text[len(around.get("before", b"")) : len(text) - len(around.get("after", b""))]
    assert between == write(kernels.decode(stored, rows_N, dtype=dtype))


layouts = st.builds(
    CodeLayout,
    num_subspaces=st.integers(1, 20),
    num_codes=st.one_of(st.integers(2, 300), st.integers(1, 16).map(lambda bits: 1 << bits)),
)
words = st.sampled_from([b"", b"[", b'{"vectors":['])


@given(
    layouts,
    st.integers(1, 12),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.integers(3, 60),
    dtypes,
    words,
    words,
)
def test_decode_to_json_equals_orjson(layout, dim, row_counts, shared, hard, num_ids, dtype, before, after):
    stored = coded(layout, dim, row_counts, shared=shared, hard=hard)
    assert_writes_as_orjson(stored, some_rows(sum(row_counts), num_ids), dtype, before=before, after=after)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_decode_to_json_writes_what_is_hard_to_write_as_orjson_does(dtype):
    numbers = np.array([*HARD_TO_WRITE, *(-number for number in HARD_TO_WRITE)], np.float32)
    layout = CodeLayout(num_subspaces=1, num_codes=len(numbers))
    stored = Coded.of(pack_codes(np.arange(len(numbers))[:, None], layout), numbers[None, :, None], layout)
    assert_writes_as_orjson(stored, np.arange(len(numbers)), dtype)


@pytest.mark.parametrize("subspace_dim", [1, 3, 4, 6, 40, 700])
def test_decode_to_json_writes_texts_of_every_length(subspace_dim):
    stored = coded(CodeLayout(num_subspaces=3, num_codes=5), subspace_dim, hard=0.5)
    assert_writes_as_orjson(stored, some_rows(37, 101))


def test_decode_to_json_of_no_rows_is_what_is_around():
    stored = coded(CodeLayout(num_subspaces=3, num_codes=5), 4)
    texts = JsonTexts.of(stored, np.float32, write)
    assert decode_to_json(stored, texts, np.empty(0, np.int64)) == b""
    assert decode_to_json(stored, texts, np.empty(0, np.int64), before=b"a,", after=b"b") == b"a,b"


def test_decode_to_json_of_missing_rows_is_zeros_even_in_an_empty_table():
    stored = coded(CodeLayout(num_subspaces=2, num_codes=5), 1, [0])
    texts = JsonTexts.of(stored, np.float32, write)
    assert decode_to_json(stored, texts, np.full(40, MISSING_ROW)) == b",".join([b"[0.0,0.0]"] * 40)


@pytest.mark.parametrize("num_codes", [5, 200, 256])
@pytest.mark.parametrize("row", [-2, 37, 2**62, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("at", [0, 50, 100])
def test_decode_to_json_raises_for_a_row_outside_the_table(num_codes, row, at):
    stored = coded(CodeLayout(num_subspaces=3, num_codes=num_codes), 4)
    rows_N = some_rows(37, 101)
    rows_N[at] = row
    with pytest.raises(DamagedArtifactError, match=f"row {row} is outside the table's 37 rows"):
        decode_to_json(stored, JsonTexts.of(stored, np.float32, write), rows_N)


@pytest.mark.parametrize("num_codes", [3, 5, 200, 257, 65_535])
def test_decode_to_json_raises_for_a_code_that_cannot_be_wherever_it_stands(num_codes):
    layout = CodeLayout(num_subspaces=3, num_codes=num_codes)
    wider = CodeLayout(num_subspaces=3, num_codes=1 << layout.code_bits)
    values_MKS = random_values(layout, 1)
    for m in range(3):
        codes_NM = random_codes(9, layout)
        codes_NM[6, m] = num_codes
        stored = Coded.of(pack_codes(codes_NM, wider), values_MKS, layout)
        texts = JsonTexts.of(stored, np.float32, write)
        with pytest.raises(DamagedArtifactError, match=f"row 6 holds a code of {num_codes} or more"):
            decode_to_json(stored, texts, np.arange(9), after=b"]")


# Every row is as long as a row can be, and there is nothing after them; Python looks whether the bytes behind the text
# are what they were.
FULL = """
import numpy as np, orjson
from dpq_rec import CodeLayout, kernels
from dpq_rec.kernels import Coded
from dpq_rec.kernels.lookup import JsonTexts, decode_to_json

def write(numbers):
    return orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]

for subspace_dim in range(1, 41):
    layout = CodeLayout(num_subspaces=3, num_codes=2)
    values_MKS = np.full((3, 2, subspace_dim), -1.2345678e-6, np.float32)
    stored = Coded.of(np.zeros((9, 1), np.uint8), values_MKS, layout)
    texts = JsonTexts.of(stored, np.float32, write)
    for num_rows in range(9):
        rows_N = np.arange(num_rows)
        assert decode_to_json(stored, texts, rows_N) == write(kernels.decode(stored, rows_N))
print("written")
"""


def test_decode_to_json_writes_nothing_behind_the_text():
    environment = {**os.environ, "PYTHONMALLOC": "debug"}
    command = [sys.executable, "-c", FULL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "written\n", "")
