"""Use of codes, held to loops over rows, numpy.bincount and scipy's entropy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpq_rec import CodeLayout, DamagedArtifactError, open_artifact, unpack_codes, write_artifact
from dpq_rec import code_use as module
from dpq_rec.code_use import blocks_of_codes, chance_of_agreement, count_codes, perplexity
from tests.dpq_rec.builders import dpq_contents, overwrite

LAYOUTS = [
    CodeLayout(num_subspaces=3, num_codes=5),
    CodeLayout(num_subspaces=1, num_codes=2),
    CodeLayout(num_subspaces=2, num_codes=256, num_levels=2),
    CodeLayout(num_subspaces=2, num_codes=65_536),
]


def table(path, num_rows, layout):
    return open_artifact(write_artifact(path, {"t": dpq_contents(num_rows, layout)})).tables["t"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_codes", [1, 40, 1 << 20])
def test_count_codes_is_the_count_of_a_loop_over_rows(tmp_path, monkeypatch, layout, block_codes):
    monkeypatch.setattr(module, "_BLOCK_CODES", block_codes)
    found = table(tmp_path / "a", 57, layout)
    wanted_MK = np.zeros((layout.codes_per_row, layout.num_codes), int)
    for codes_M in unpack_codes(found.tensors["packed_codes"], layout).tolist():
        for m, code in enumerate(codes_M):
            wanted_MK[m, code] += 1
    told = []
    np.testing.assert_array_equal(count_codes(found, told.append), wanted_MK)
    assert sum(told) == 57


@pytest.mark.parametrize("layout", LAYOUTS)
def test_count_codes_is_numpys_bincount(tmp_path, layout):
    found = table(tmp_path / "a", 300, layout)
    codes_VM = unpack_codes(found.tensors["packed_codes"], layout)
    wanted_MK = [np.bincount(codes_V, minlength=layout.num_codes) for codes_V in codes_VM.T]
    np.testing.assert_array_equal(count_codes(found), wanted_MK)


def test_count_codes_of_no_rows_is_zero(tmp_path):
    counts_MK = count_codes(table(tmp_path / "a", 0, LAYOUTS[0]))
    assert counts_MK.tolist() == [[0] * 5] * 3
    assert perplexity(counts_MK).tolist() == [1, 1, 1]


@pytest.mark.parametrize("block_codes", [1, 1 << 20])
def test_blocks_of_codes_name_the_damaged_row(tmp_path, monkeypatch, block_codes):
    monkeypatch.setattr(module, "_BLOCK_CODES", block_codes)
    path = write_artifact(tmp_path / "a", {"t": dpq_contents(9, LAYOUTS[0])})
    overwrite(path, "t", "packed_codes", 2 * 6, b"\xff")  # rows of two bytes, codes of three bits below 5
    with pytest.raises(DamagedArtifactError, match="'t': row 6 holds a code of 5 or more"):
        list(blocks_of_codes(open_artifact(path).tables["t"]))


counts = st.lists(st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any), min_size=1, max_size=5)


@given(counts)
def test_perplexity_is_the_exp_of_scipys_entropy(counts):
    np.testing.assert_allclose(perplexity(np.array(counts)), np.exp(stats.entropy(counts, axis=1)))


def test_perplexity_is_k_where_all_are_used_alike_and_1_where_one_is_used():
    assert perplexity(np.array([[7, 7, 7, 7], [0, 28, 0, 0]])) == pytest.approx([4, 1])


def test_chance_of_agreement_is_that_of_all_pairs_of_rows():
    codes = [0, 0, 2, 1, 2, 2]
    pairs = [a == b for a in codes for b in codes]
    got = chance_of_agreement(np.bincount(codes, minlength=4)[None])
    assert got == pytest.approx([sum(pairs) / len(pairs)])
    assert math.isclose(got[0], 14 / 36)
