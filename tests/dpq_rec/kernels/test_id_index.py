import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec.kernels.ids import build_slots, build_tree, num_slots, num_tree_keys
from dpq_rec.strings import PackedStrings
from tests import references

FILLING = 2**63 - 1


@pytest.mark.parametrize("num_ids", [0, 1, 16])
def test_build_tree_of_one_leaf_has_no_keys(num_ids):
    assert build_tree(np.arange(num_ids)).shape == (0,)


def test_build_tree_of_two_levels_puts_the_root_first():
    root = [0, 256, 512] + 13 * [FILLING]
    above_the_leaves = [*range(0, 529, 16)] + 14 * [FILLING]
    assert build_tree(np.arange(530)).tolist() == root + above_the_leaves


@pytest.mark.parametrize("num_ids", [0, 1, 16, 17, 256, 257, 4096, 4097, 70_000])
def test_num_tree_keys_is_the_length_of_the_tree(num_ids):
    assert len(build_tree(np.arange(num_ids))) == num_tree_keys(num_ids)


@given(st.lists(st.text(max_size=40), unique=True, max_size=60))
def test_build_slots_equals_the_reference(texts):
    strings = PackedStrings.pack(sorted(text.encode() for text in texts))
    slots_H = build_slots(*strings)
    assert slots_H.dtype == np.uint32
    assert slots_H.tolist() == references.fill_slots(*strings, num_slots(len(texts))).tolist()


def test_build_slots_equals_the_reference_in_a_long_list():
    strings = PackedStrings.pack(sorted(f"item_{i}".encode() for i in range(5000)))
    assert build_slots(*strings).tolist() == references.fill_slots(*strings, num_slots(5000)).tolist()
