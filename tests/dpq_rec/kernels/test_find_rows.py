import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import DamagedArtifactError, IdTypeError
from dpq_rec.kernels import MISSING_ROW
from dpq_rec.kernels.ids import build_slots, find_disorder, find_string_rows, num_slots
from dpq_rec.strings import PackedStrings
from tests import references

# Few characters, so that ids repeat and are prefixes of each other: 1 to 4 bytes in UTF-8, NUL and the last one.
ids = st.one_of(st.text("\0abü€😀", max_size=5), st.text(max_size=12))
lists_of_ids = st.lists(ids, unique=True, max_size=70)
LAST = "\U0010ffff"


def packed(texts):
    """The texts, sorted by bytes, and rows that tell them apart."""
    sorted_U = sorted(text.encode() for text in texts)
    return PackedStrings.pack(sorted_U), np.arange(len(sorted_U), dtype=np.uint32)[::-1].copy() + 7


@pytest.mark.parametrize("has_slots", [True, False])
@given(lists_of_ids, st.lists(ids, max_size=70))
def test_find_rows_equals_the_reference(has_slots, known, wanted_ids):
    strings, rows_U = packed(known)
    wanted_ids = [*wanted_ids, *known, *wanted_ids]
    found_N = find_string_rows(wanted_ids, *strings, rows_U, build_slots(*strings) if has_slots else None)
    assert found_N.dtype == np.int64
    assert found_N.tolist() == references.find_string_rows(wanted_ids, *strings, rows_U).tolist()


@pytest.mark.parametrize("num_ids", [0, 1, 2, 31, 32, 33, 64, 1000])
@pytest.mark.parametrize("num_known", [0, 1, 2, 3, 63, 64, 65, 1000])
@pytest.mark.parametrize("has_slots", [True, False])
def test_find_rows_equals_the_reference_in_lists_of_any_length(num_ids, num_known, has_slots):
    strings, rows_U = packed([f"item_{i}" for i in range(num_known)])
    wanted_ids = [f"item_{i}" for i in np.random.default_rng(num_ids).integers(-1, num_known + 1, num_ids)]
    wanted_ids[-2:] = ["item_0", f"item_{num_known - 1}"][:num_ids]
    found_N = find_string_rows(wanted_ids, *strings, rows_U, build_slots(*strings) if has_slots else None)
    assert found_N.tolist() == references.find_string_rows(wanted_ids, *strings, rows_U).tolist()


def test_find_rows_finds_the_empty_string_and_strings_with_nul():
    strings, rows_U = packed(["", "\0", "a", "a\0", "a\0\0", LAST])
    wanted_ids, wanted = ["a\0", "", "\0", "\0\0", "a", LAST, "a\0\0"], [9, 12, 11, MISSING_ROW, 10, 7, 8]
    assert find_string_rows(wanted_ids, *strings, rows_U).tolist() == wanted
    assert find_string_rows(wanted_ids, *strings, rows_U, build_slots(*strings)).tolist() == wanted


def test_find_rows_takes_tuples_and_subclasses_of_str():
    strings, rows_U = packed(["a", "b"])
    assert find_string_rows((np.str_("b"), "a"), *strings, rows_U).tolist() == [7, 8]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (b"a", "got bytes"),
        (None, "got NoneType"),
        (7, "got int"),
        (["a"], "got list"),
        ("\udcff", "got half a surrogate"),
    ],
)
@pytest.mark.parametrize("at", [0, 40])
def test_find_rows_refuses_what_is_no_utf_8(wrong, message, at):
    strings, rows_U = packed(["a", "b"])
    wanted_ids = ["a"] * 50
    wanted_ids[at] = wrong
    with pytest.raises(IdTypeError, match=f"ids: {message}.* at position {at}"):
        find_string_rows(wanted_ids, *strings, rows_U)


HOSTILE_OFFSETS = {
    "beyond the bytes": [0, 1, 2**62, 3],
    "far below": [0, -(2**63), 2, 3],
    "just below": [0, 1, -1, 3],
    "the wrong way round": [0, 2, 1, 3],
    "the end beyond the bytes": [0, 1, 2, 4],
}


@pytest.mark.parametrize("name", HOSTILE_OFFSETS)
def test_find_rows_reads_nothing_outside_the_bytes(name):
    id_bytes_T, rows_U = np.frombuffer(b"abc", np.uint8), np.arange(3, dtype=np.uint32)
    with pytest.raises(DamagedArtifactError, match="lies outside its 3 bytes"):
        find_string_rows(["a", "b", "c"], id_bytes_T, np.array(HOSTILE_OFFSETS[name]), rows_U)


@given(st.lists(st.one_of(st.integers(-2, 8), st.integers(-(2**63), 2**63 - 1)), min_size=4, max_size=9))
def test_find_rows_answers_or_refuses_whatever_the_offsets_are(offsets):
    id_bytes_T, rows_U = np.frombuffer(b"abcdef", np.uint8), np.arange(len(offsets) - 1, dtype=np.uint32)
    try:
        found_N = find_string_rows(["a", "cd", "z", ""], id_bytes_T, np.array(offsets), rows_U)
    except DamagedArtifactError:
        return
    assert all(-1 <= row < len(rows_U) for row in found_N.tolist())


@pytest.mark.parametrize("name", HOSTILE_OFFSETS)
def test_find_rows_by_slots_reads_nothing_outside_the_bytes(name):
    strings, rows_U = packed(["a", "b", "c"])
    with pytest.raises(DamagedArtifactError, match="lies outside its 3 bytes"):
        find_string_rows(
            ["a", "b", "c"], strings.bytes_T, np.array(HOSTILE_OFFSETS[name]), rows_U, build_slots(*strings)
        )


@given(st.data())
def test_find_rows_answers_rightly_or_refuses_whatever_the_slots_are(data):
    strings, rows_U = packed(["", *map(str, range(9))])
    slot = st.one_of(st.integers(0, 12), st.integers(0, 2**32 - 1))
    slots_H = np.array(data.draw(st.lists(slot, min_size=num_slots(10), max_size=num_slots(10))), np.uint32)
    for text in ["", "3", "8", "none"]:
        try:
            found = find_string_rows([text], *strings, rows_U, slots_H)[0]
        except DamagedArtifactError:
            continue
        assert found in (MISSING_ROW, references.find_string_rows([text], *strings, rows_U)[0])


def slot_of_b():
    """Of "b" in a list of two, of which it is number 0: its tag, and 1 in the two lowest bits."""
    return next(slot for slot in build_slots(*packed(["b", "c"])[0]).tolist() if slot % 4 == 1)


@pytest.mark.parametrize("number", [0, 3])
def test_find_rows_refuses_slots_that_name_no_id(number):
    strings, rows_U = packed(["a", "c"])
    slots_H = np.full(num_slots(2), slot_of_b() - 1 + number, np.uint32)
    with pytest.raises(DamagedArtifactError, match="id_slots name an id that is none of its 2"):
        find_string_rows(["b"], *strings, rows_U, slots_H)


@pytest.mark.timeout(20)
def test_find_rows_comes_to_an_end_where_slots_have_none():
    strings, rows_U = packed(["a", "c"])
    slots_H = np.full(num_slots(2), slot_of_b(), np.uint32)
    with pytest.raises(DamagedArtifactError, match="or have no end"):
        find_string_rows(["b"], *strings, rows_U, slots_H)


def test_find_rows_reads_arrays_that_are_not_aligned():
    strings, rows_U = packed(["a", "bb", "c"])
    unaligned = [np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1) for array in (strings.offsets_U1, rows_U)]
    assert not unaligned[0].flags.aligned
    assert find_string_rows(["bb", "c", "d"], strings.bytes_T, *unaligned).tolist() == [8, 7, MISSING_ROW]


def test_find_rows_holds_the_strings_while_it_searches_without_the_gil():
    strings, rows_U = packed([f"item_{i}" for i in range(1000)])
    wanted_ids = [f"item_{i}" for i in range(200_000)]
    before = most = sys.getrefcount(wanted_ids[0])
    thread = threading.Thread(target=find_string_rows, args=(wanted_ids, *strings, rows_U))
    thread.start()
    while thread.is_alive():
        most = max(most, sys.getrefcount(wanted_ids[0]))
    assert most > before


def test_find_rows_leaves_no_reference_behind():
    strings, rows_U = packed(["a"])
    wanted_ids = [f"{i}!" for i in range(100)]
    before = [sys.getrefcount(text) for text in wanted_ids]
    find_string_rows(wanted_ids, *strings, rows_U)
    assert [sys.getrefcount(text) for text in wanted_ids] == before


@given(st.lists(ids, max_size=20), st.booleans())
def test_find_disorder_equals_the_reference(texts, in_order):
    texts = sorted(set(texts)) if in_order else texts
    strings = PackedStrings.pack([text.encode() for text in texts])
    assert find_disorder(*strings) == references.find_disorder(*strings)
    assert not in_order or find_disorder(*strings) is None


@pytest.mark.parametrize("name", HOSTILE_OFFSETS)
def test_find_disorder_finds_offsets_outside_the_bytes(name):
    offsets = np.array(HOSTILE_OFFSETS[name])
    assert find_disorder(np.frombuffer(b"abc", np.uint8), offsets) in (0, 1, 2)
