import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import DamagedArtifactError
from dpq_rec.kernels import MISSING_ROW, lookup
from dpq_rec.kernels.ids import build_tree, num_tree_keys, sorted_integers
from tests import references

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
# A leaf, a node, two levels to four, and what is around them; 128 ids are searched together.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 271, 272, 273, 4095, 4096, 4097, 4100, 5000, 65_535, 65_537]
KINDS = ["spread", "clustered", "consecutive", "geometric"]
ids = st.one_of(st.integers(-40, 40), st.integers(INT64_MIN, INT64_MAX), st.sampled_from([INT64_MIN, INT64_MAX]))


def find_integer_rows(wanted_N, *known):
    """Of ids, rows and perhaps a tree."""
    return lookup.find_integer_rows(wanted_N, sorted_integers(*known))


def sorted_ids(kind, num_ids, seed=0):
    generator = np.random.default_rng(seed)
    if kind == "clustered":
        gaps_U = np.where(generator.random(num_ids) < 0.02, 2**40, generator.integers(1, 3, num_ids))
        return np.cumsum(gaps_U) - 2**45
    if kind == "consecutive":
        return np.arange(num_ids) - num_ids // 2
    if kind == "geometric":
        return np.cumsum(1 << np.arange(num_ids) % 45) - 2**60
    ids_U = np.unique(generator.integers(INT64_MIN, INT64_MAX, num_ids + 9, endpoint=True))[:num_ids]
    ids_U[[0, -1]] = INT64_MIN, INT64_MAX
    return ids_U


def rows_of(ids_U):
    """Rows that tell the ids apart."""
    return np.arange(len(ids_U), dtype=np.uint32)[::-1].copy() + 7


def around(ids_U):
    """The ids, and what is just below and just above each (beyond the last one: the first)."""
    return np.concatenate([ids_U, ids_U - 1, ids_U + 1, [0, INT64_MIN, INT64_MAX]])


def assert_equals_the_reference(wanted_N, ids_U, tree_T):
    rows_U = rows_of(ids_U)
    found_N = find_integer_rows(wanted_N, ids_U, rows_U, tree_T)
    assert found_N.dtype == np.int64
    assert found_N.tolist() == references.find_integer_rows(wanted_N, ids_U, rows_U).tolist()


@pytest.mark.parametrize("has_tree", [True, False])
@given(st.lists(ids, unique=True, max_size=700), st.lists(ids, max_size=300))
def test_find_integer_rows_equals_the_reference(has_tree, known, wanted_ids):
    ids_U = np.array(sorted(known), np.int64)
    wanted_N = np.concatenate([np.array(wanted_ids, np.int64), around(ids_U)])
    assert_equals_the_reference(wanted_N, ids_U, build_tree(ids_U) if has_tree else None)


@pytest.mark.parametrize("has_tree", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ids", LENGTHS)
def test_find_integer_rows_equals_the_reference_in_lists_of_any_length(num_ids, kind, has_tree):
    ids_U = sorted_ids(kind, num_ids)
    wanted_N = np.random.default_rng(1).permutation(around(ids_U))
    assert_equals_the_reference(wanted_N, ids_U, build_tree(ids_U) if has_tree else None)


@pytest.mark.parametrize("num_asked", [0, 1, 127, 128, 129, 256, 1000])
@pytest.mark.parametrize("has_tree", [True, False])
def test_find_integer_rows_finds_any_number_of_ids(num_asked, has_tree):
    ids_U = sorted_ids("spread", 3000)
    wanted_N = np.random.default_rng(2).choice(around(ids_U), num_asked)
    assert_equals_the_reference(wanted_N, ids_U, build_tree(ids_U) if has_tree else None)


def test_find_integer_rows_finds_nothing_in_an_empty_list():
    nothing = np.empty(0, np.int64)
    assert find_integer_rows(np.array([0, 5]), nothing, rows_of(nothing)).tolist() == [MISSING_ROW, MISSING_ROW]


def test_find_integer_rows_reads_arrays_that_are_not_aligned():
    ids_U = sorted_ids("spread", 1000)
    arrays = [ids_U, rows_of(ids_U), build_tree(ids_U)]
    unaligned = [np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1) for array in arrays]
    assert not unaligned[0].flags.aligned
    assert find_integer_rows(around(ids_U), *unaligned).tolist() == (
        references.find_integer_rows(around(ids_U), ids_U, rows_of(ids_U)).tolist()
    )


@given(st.data())
def test_find_integer_rows_answers_rightly_or_refuses_whatever_the_tree_is(data):
    num_ids = data.draw(st.sampled_from([17, 40, 256, 257, 300, 4097]))
    ids_U = sorted_ids(data.draw(st.sampled_from(KINDS)), num_ids)
    num_bytes = 8 * num_tree_keys(num_ids)
    tree_T = np.frombuffer(data.draw(st.binary(min_size=num_bytes, max_size=num_bytes)), np.int64)
    for an_id in data.draw(st.lists(st.sampled_from(around(ids_U).tolist()), min_size=1, max_size=50)):
        try:
            assert_equals_the_reference(np.array([an_id]), ids_U, tree_T)
        except DamagedArtifactError:
            continue


def test_find_integer_rows_refuses_every_id_that_a_damaged_tree_hides():
    ids_U, refused = sorted_ids("consecutive", 4097), 0
    generator = np.random.default_rng(3)
    for _ in range(20):
        tree_T = generator.integers(INT64_MIN, INT64_MAX, num_tree_keys(4097)) >> generator.integers(0, 60)
        for an_id in generator.choice(ids_U, 50):
            try:
                assert_equals_the_reference(np.array([an_id]), ids_U, tree_T)
            except DamagedArtifactError:
                refused += 1
    assert refused > 500


def test_find_integer_rows_names_the_id_that_was_led_astray():
    ids_U = np.arange(300)
    tree_T = build_tree(ids_U)
    tree_T[16:] = INT64_MAX
    with pytest.raises(DamagedArtifactError, match="id_tree leads id 290 to where it cannot be"):
        find_integer_rows(np.array([3, 260, 290]), ids_U, rows_of(ids_U), tree_T)


def test_find_integer_rows_reads_nothing_outside_the_list_whatever_the_ids_are():
    generator = np.random.default_rng(4)
    ids_U = generator.integers(-50, 50, 1000)
    tree_T = generator.integers(-50, 50, num_tree_keys(1000))
    for an_id in range(-60, 60):
        for tree in (None, tree_T):
            try:
                found = find_integer_rows(np.array([an_id]), ids_U, np.arange(1000, dtype=np.uint32), tree)[0]
            except DamagedArtifactError:
                continue
            assert found == MISSING_ROW or ids_U[found] == an_id


# The tree, the ids and the rows end where readable memory ends: to read beyond one of them is to crash.
AT_THE_END_OF_MEMORY = """
import numpy as np
from dpq_rec import DamagedArtifactError
from dpq_rec.kernels.ids import num_tree_keys
from dpq_rec.kernels import MISSING_ROW
from dpq_rec.kernels.ids import sorted_integers
from dpq_rec.kernels.lookup import find_integer_rows
from tests.dpq_rec.kernels.end_of_memory import at_the_end

lowest, highest = np.iinfo(np.int64).min, np.iinfo(np.int64).max
generator = np.random.default_rng(0)
answered = refused = 0
for num_ids in (17, 40, 255, 257, 273, 4_097, 5_000, 65_537):
    rows = at_the_end(np.arange(num_ids, dtype=np.uint32))
    for bound in (2, num_ids, 2**40):
        ids = at_the_end(generator.integers(-bound, bound, num_ids))
        tree = at_the_end(generator.integers(-bound, bound, num_tree_keys(num_ids)))
        tree[generator.random(len(tree)) < 0.5] = lowest
        for an_id in (lowest, -bound, -1, 0, bound // 2, bound - 1, highest):
            try:
                found = find_integer_rows(np.array([an_id]), sorted_integers(ids, rows, tree))[0]
            except DamagedArtifactError:
                refused += 1
            else:
                answered += 1
                assert found == MISSING_ROW or ids[found] == an_id
print("answered", answered, "refused", refused)
"""


def test_find_integer_rows_reads_nothing_beyond_its_arrays_whatever_they_hold():
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END_OF_MEMORY], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    answered, refused = map(int, done.stdout.split()[1::2])
    assert answered > 20
    assert refused > 20
