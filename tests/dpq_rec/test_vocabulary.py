import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpq_rec import (
    ArtifactError,
    ConfigError,
    DamagedArtifactError,
    IdentityVocabulary,
    IdTypeError,
    Int64Vocabulary,
    ModuloVocabulary,
    StringVocabulary,
)
from dpq_rec import vocabulary as vocabulary_module
from dpq_rec.kernels import MISSING_ROW
from dpq_rec.kernels.ids import build_slots, build_tree, num_slots
from dpq_rec.strings import PackedStrings
from dpq_rec.vocabulary import load_vocabulary

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
ids = st.one_of(st.integers(-9, 9), st.integers(INT64_MIN, INT64_MAX), st.sampled_from([INT64_MIN, INT64_MAX]))
rows_of_ids = st.dictionaries(ids, st.integers(0, 12), max_size=20)


def int64_vocabulary(row_of_id):
    ids_U = np.array(sorted(row_of_id), np.int64)
    return Int64Vocabulary(ids_U, np.array([row_of_id[int(i)] for i in ids_U], np.uint32))


@pytest.fixture(params=[IdentityVocabulary(10), ModuloVocabulary(10), Int64Vocabulary.from_ids([5, -2, 9])])
def vocabulary(request):
    return request.param


@given(rows_of_ids, st.lists(ids, max_size=30))
def test_int64_vocabulary_finds_the_rows_that_a_dict_finds(row_of_id, wanted):
    wanted = wanted + list(row_of_id)
    found_N = int64_vocabulary(row_of_id).rows(wanted)
    assert found_N.tolist() == [row_of_id.get(i, MISSING_ROW) for i in wanted]


@given(st.lists(ids, unique=True, max_size=20), st.lists(ids, max_size=20))
def test_int64_vocabulary_from_ids_puts_each_id_into_its_own_row(ids_V, wanted):
    row_of_id = {i: row for row, i in enumerate(ids_V)}
    found_N = Int64Vocabulary.from_ids(ids_V).rows(wanted + ids_V)
    assert found_N.tolist() == [row_of_id.get(i, MISSING_ROW) for i in wanted + ids_V]


@given(st.integers(0, 50), st.lists(ids))
def test_identity_vocabulary_finds_ids_that_are_rows(num_embeddings, wanted):
    row_of_id = {row: row for row in range(num_embeddings)}
    assert IdentityVocabulary(num_embeddings).rows(wanted).tolist() == [row_of_id.get(i, MISSING_ROW) for i in wanted]


@given(st.integers(1, 50), st.lists(ids))
def test_modulo_vocabulary_finds_the_remainder_of_any_id(num_embeddings, wanted):
    assert ModuloVocabulary(num_embeddings).rows(wanted).tolist() == [i % num_embeddings for i in wanted]


@given(rows_of_ids, st.integers(0, 13), st.integers(0, 13))
def test_int64_vocabulary_ids_of_rows_lists_every_id_of_the_range_by_row(row_of_id, start, stop):
    ids_N, rows_N = int64_vocabulary(row_of_id).ids_of_rows(start, stop)
    wanted = sorted((row, i) for i, row in row_of_id.items() if start <= row < stop)
    assert list(zip(rows_N.tolist(), ids_N.tolist(), strict=True)) == wanted


def test_int64_vocabulary_ids_of_rows_looks_through_every_piece_of_a_long_list(monkeypatch):
    monkeypatch.setattr(vocabulary_module, "_SCAN_ROWS", 3)
    ids_V = np.random.default_rng(0).permutation(20) - 7
    ids_N, rows_N = Int64Vocabulary.from_ids(ids_V).ids_of_rows(4, 17)
    assert (ids_N.tolist(), rows_N.tolist()) == (ids_V[4:17].tolist(), list(range(4, 17)))


@pytest.mark.parametrize("kind", [IdentityVocabulary, ModuloVocabulary])
def test_ids_of_rows_are_the_rows_where_ids_are_rows(kind):
    ids_N, rows_N = kind(10).ids_of_rows(3, 6)
    assert (ids_N.tolist(), rows_N.tolist()) == ([3, 4, 5], [3, 4, 5])


def test_rows_of_no_ids_are_no_rows(vocabulary):
    assert (vocabulary.rows([]).shape, vocabulary.rows([]).dtype) == ((0,), np.int64)


def test_int64_vocabulary_without_ids_finds_nothing():
    assert Int64Vocabulary.from_ids([]).rows([0, 1]).tolist() == [MISSING_ROW, MISSING_ROW]


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8, np.uint32, np.uint64, ">i8"])
def test_rows_takes_any_integer_type(vocabulary, dtype):
    assert vocabulary.rows(np.array([5, 9], dtype)).tolist() == vocabulary.rows([5, 9]).tolist()


def test_rows_takes_every_other_element_of_an_array(vocabulary):
    assert vocabulary.rows(np.arange(10)[::2]).tolist() == vocabulary.rows([0, 2, 4, 6, 8]).tolist()


REFUSED = {
    "floats": [1.0, 2.0],
    "integers and a float": [1, 2.5],
    "booleans": [True, False],
    "integers and a boolean": [1, True],
    "an array of booleans": np.array([True]),
    "strings": ["5", "9"],
    "integers and a string": [5, "9"],
    "integers and None": [5, None],
    "a string": "59",
    "a number": 5,
    "nothing": None,
    "lists": [[5], [9]],
    "lists of different lengths": [[5], [9, 1]],
    "a dict": {5: 9},
    "2**63": [2**63],
    "2**63 as uint64": np.array([2**63], np.uint64),
    "2**63 and a negative": [2**63, -1],
    "2**64": [2**64],
    "-2**63-1": [-(2**63) - 1],
    "dates": np.array(["2020-01-01"], "datetime64[D]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_refuses_what_is_not_a_flat_list_of_integers(vocabulary, name):
    with pytest.raises(IdTypeError, match="ids: got"):
        vocabulary.rows(REFUSED[name])


@given(rows_of_ids, st.randoms())
def test_int64_vocabulary_from_pairs_takes_ids_in_any_order(row_of_id, random):
    ids_U = random.sample(sorted(row_of_id), len(row_of_id))
    vocabulary = Int64Vocabulary.from_pairs(ids_U, [row_of_id[i] for i in ids_U])
    vocabulary.check(13)
    assert vocabulary.rows(ids_U).tolist() == [row_of_id[i] for i in ids_U]


def test_from_ids_refuses_an_id_in_two_rows():
    with pytest.raises(ConfigError, match="id 7 stands in two rows"):
        Int64Vocabulary.from_ids([3, 7, 1, 7])


def test_int64_vocabulary_refuses_ids_and_rows_of_different_lengths():
    with pytest.raises(ConfigError, match="want two equal lengths"):
        Int64Vocabulary(np.arange(3), np.arange(2, dtype=np.uint32))


@pytest.mark.parametrize("texts", [[b"b", b"a"], [b"a", b"a"], [b"a", b"b", b""], [b"ab", b"a"]], ids=str)
def test_check_finds_strings_that_are_not_strictly_ascending(texts):
    vocabulary = StringVocabulary(PackedStrings.pack(texts), np.zeros(len(texts), np.uint32))
    with pytest.raises(DamagedArtifactError, match="not strictly ascending"):
        vocabulary.check(1)


@pytest.mark.parametrize("scan_rows", [2, 3, 100])
@pytest.mark.parametrize("ids_U", [[1, 2, 2, 3, 4], [1, 2, 3, 5, 4], [2, 1, 3, 4, 5], [1, 2, 4, 3, 5]])
def test_check_finds_ids_that_are_not_strictly_ascending(monkeypatch, scan_rows, ids_U):
    monkeypatch.setattr(vocabulary_module, "_SCAN_ROWS", scan_rows)
    with pytest.raises(DamagedArtifactError, match="not strictly ascending"):
        Int64Vocabulary(np.array(ids_U), np.zeros(5, np.uint32)).check(1)


def test_check_finds_a_row_outside_the_table():
    with pytest.raises(DamagedArtifactError, match="a row outside the table's 3"):
        Int64Vocabulary(np.arange(3), np.array([0, 3, 1], np.uint32)).check(3)


def test_check_accepts_what_from_ids_makes():
    Int64Vocabulary.from_ids([INT64_MAX, 0, INT64_MIN]).check(3)


def test_load_vocabulary_gives_back_what_was_stored(vocabulary):
    loaded = load_vocabulary(vocabulary.kind, 10, vocabulary.tensors())
    assert (loaded.kind, loaded.rows([5, 9, -1]).tolist()) == (vocabulary.kind, vocabulary.rows([5, 9, -1]).tolist())


def test_load_vocabulary_refuses_a_kind_that_it_does_not_know():
    with pytest.raises(ArtifactError, match="got 'uuid', this version reads identity, modulo, int64 and string"):
        load_vocabulary("uuid", 3, {})


INT64, UINT32 = np.arange(3), np.arange(3, dtype=np.uint32)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"ids": INT64},
        {"rows": UINT32},
        {"ids": INT64.astype(np.float32), "rows": UINT32},
        {"ids": INT64, "rows": INT64},
        {"ids": INT64, "rows": UINT32[:2]},
        {"ids": INT64[:, None], "rows": UINT32[:, None]},
        {"ids": INT64, "rows": UINT32, "id_tree": np.zeros(16, np.int64)},
        {"ids": np.arange(17), "rows": np.zeros(17, np.uint32), "id_tree": np.zeros(15, np.int64)},
        {"ids": np.arange(17), "rows": np.zeros(17, np.uint32), "id_tree": np.zeros(16)},
        {"ids": np.arange(17), "rows": np.zeros(17, np.uint32), "id_tree": np.zeros((16, 1), np.int64)},
    ],
)
def test_load_vocabulary_calls_tensors_that_do_not_fit_damaged(tensors):
    with pytest.raises(DamagedArtifactError):
        load_vocabulary("int64", 3, tensors)


@pytest.mark.parametrize("num_ids", [0, 1, 16, 17, 300])
def test_int64_vocabulary_without_a_tree_finds_what_one_with_a_tree_finds(num_ids):
    ids_U, rows_U = np.arange(num_ids) * 3 - 99, np.arange(num_ids, dtype=np.uint32)
    wanted = np.arange(-110, 3 * num_ids)
    without = load_vocabulary("int64", num_ids, {"ids": ids_U, "rows": rows_U})
    assert without.tensors().keys() == {"ids", "rows"}
    without.check(num_ids)
    assert without.rows(wanted).tolist() == without.indexed().rows(wanted).tolist()


def test_int64_vocabulary_from_ids_has_a_tree_and_indexed_leaves_it():
    vocabulary = Int64Vocabulary.from_ids(np.arange(300)[::-1])
    assert vocabulary.tensors()["id_tree"].tolist() == build_tree(np.arange(300)).tolist()
    assert vocabulary.indexed() is vocabulary


@pytest.mark.parametrize("num_ids", [1000, 4096, 4097, 100_000])
def test_int64_vocabulary_takes_at_most_13_bytes_an_id(num_ids):
    tensors = Int64Vocabulary.from_ids(np.arange(num_ids)).tensors()
    assert 12.5 < sum(tensor.nbytes for tensor in tensors.values()) / num_ids <= 13


@pytest.mark.parametrize("at", [0, 5, 18, 19, 31, 47])
def test_check_finds_a_tree_that_is_not_that_of_the_ids(at):
    ids_U, rows_U = np.arange(300) * 5, np.arange(300, dtype=np.uint32)
    tree_T = build_tree(ids_U)
    Int64Vocabulary(ids_U, rows_U, tree_T).check(300)
    tree_T[at] -= 1
    with pytest.raises(DamagedArtifactError, match="id_tree is not that of its ids"):
        Int64Vocabulary(ids_U, rows_U, tree_T).check(300)


# Strings

texts = st.one_of(st.text("\0abü€😀", max_size=4), st.text(max_size=9))
rows_of_texts = st.dictionaries(texts, st.integers(0, 12), max_size=20)


def string_vocabulary(row_of_text):
    return StringVocabulary.from_pairs(list(row_of_text), list(row_of_text.values()))


@given(rows_of_texts, st.lists(texts, max_size=30))
def test_string_vocabulary_finds_the_rows_that_a_dict_finds(row_of_text, wanted):
    wanted = wanted + list(row_of_text)
    found_N = string_vocabulary(row_of_text).rows(wanted)
    assert found_N.dtype == np.int64
    assert found_N.tolist() == [row_of_text.get(text, MISSING_ROW) for text in wanted]


@given(st.lists(texts, unique=True, max_size=20), st.lists(texts, max_size=20))
def test_string_vocabulary_from_ids_puts_each_id_into_its_own_row(ids_V, wanted):
    row_of_text = {text: row for row, text in enumerate(ids_V)}
    vocabulary = StringVocabulary.from_ids(ids_V)
    vocabulary.check(len(ids_V))
    assert vocabulary.rows(wanted + ids_V).tolist() == [row_of_text.get(text, MISSING_ROW) for text in wanted + ids_V]


@given(rows_of_texts, st.integers(0, 13), st.integers(0, 13))
def test_string_vocabulary_ids_of_rows_lists_every_id_of_the_range_by_row(row_of_text, start, stop):
    ids_N, rows_N = string_vocabulary(row_of_text).ids_of_rows(start, stop)
    wanted = sorted((row, text) for text, row in row_of_text.items() if start <= row < stop)
    assert list(zip(rows_N.tolist(), ids_N.tolist(), strict=True)) == wanted
    assert ids_N[1:3] == [text for _, text in wanted[1:3]]


@given(rows_of_texts)
def test_load_vocabulary_gives_back_the_strings_that_were_stored(row_of_text):
    stored = string_vocabulary(row_of_text).tensors()
    loaded = load_vocabulary("string", 13, stored)
    loaded.check(13)
    assert loaded.rows(list(row_of_text)).tolist() == list(row_of_text.values())
    assert sum(tensor.nbytes for tensor in stored.values()) == (
        sum(len(text.encode()) + 12 for text in row_of_text) + 8 + 4 * num_slots(len(row_of_text))
    )


def test_string_vocabulary_sorts_by_bytes():
    tensors = StringVocabulary.from_ids(["😀", "\uffff", "b", "", "ab", "a"]).tensors()
    assert tensors["id_bytes"].tobytes() == "aabb\uffff😀".encode()
    assert tensors["id_offsets"].tolist() == [0, 0, 1, 3, 4, 7, 11]
    assert tensors["rows"].tolist() == [3, 5, 4, 2, 1, 0]


@pytest.mark.parametrize(
    "wanted",
    [
        ("b", "x"),
        np.array(["b", "x"]),
        np.array(["b", "x"], object),
        np.array(["b", "-", "x", "-"])[::2],
        [np.str_("b"), "x"],
        np.array(["b", "x"], np.dtypes.StringDType()),
    ],
    ids=["tuple", "array", "objects", "every other", "subclass", "StringDType"],
)
def test_string_vocabulary_takes_strings_in_any_list(wanted):
    assert StringVocabulary.from_ids(["a", "b"]).rows(wanted).tolist() == [1, MISSING_ROW]
    assert StringVocabulary.from_ids(wanted).rows(["x"]).tolist() == [1]


@pytest.mark.parametrize("nothing", [[], (), np.array([]), np.empty(0, np.int64), np.empty(0, "U3")])
def test_string_vocabulary_finds_no_rows_of_no_ids(nothing):
    found_N = StringVocabulary.from_ids(["a"]).rows(nothing)
    assert (found_N.shape, found_N.dtype) == ((0,), np.int64)


NO_STRINGS = {
    "bytes": [b"a"],
    "an array of bytes": np.array([b"a"]),
    "integers": [1, 2],
    "an array of integers": np.arange(2),
    "booleans": [True],
    "None": [None],
    "a string and None": ["a", None],
    "a string and an integer": ["a", 1],
    "objects": np.array(["a", 1], object),
    "lists": [["a"]],
    "an array of arrays": np.array([["a"]]),
    "a string": "ab",
    "a dict": {"a": 1},
    "nothing": None,
    "half a surrogate pair": ["a", "\ud800"],
}


@pytest.mark.parametrize("name", NO_STRINGS)
@pytest.mark.parametrize("take", [StringVocabulary.from_ids(["a", "b"]).rows, StringVocabulary.from_ids])
def test_string_vocabulary_refuses_what_is_not_a_flat_list_of_strings(name, take):
    with pytest.raises(IdTypeError, match="ids: got"):
        take(NO_STRINGS[name])


@pytest.mark.parametrize(
    ("kind", "ids_U"), [(StringVocabulary, ["x", "it's", "y", "it's"]), (Int64Vocabulary, [4, 7, 5, 7])]
)
def test_from_pairs_refuses_an_id_that_is_given_twice(kind, ids_U):
    shown = str(ids_U[1]) if kind is Int64Vocabulary else repr(ids_U[1])
    with pytest.raises(ConfigError, match=f"id {shown} stands in two rows, or twice in one"):
        kind.from_pairs(ids_U, [0, 1, 2, 1])


@pytest.mark.parametrize(("kind", "ids_U"), [(StringVocabulary, ["x", "y"]), (Int64Vocabulary, [4, 7])])
@pytest.mark.parametrize(
    ("rows_U", "message"),
    [
        ([0], "got 2 ids and 1 rows"),
        ([0, 1, 2], "got 2 ids and 3 rows"),
        ([0, -1], "got rows -1 to 0"),
        ([0, 2**32], r"want 0 to 4294967295"),
    ],
)
def test_from_pairs_refuses_rows_that_do_not_fit(kind, ids_U, rows_U, message):
    with pytest.raises(ConfigError, match=message):
        kind.from_pairs(ids_U, rows_U)


def test_string_vocabulary_refuses_ids_and_rows_of_different_lengths():
    with pytest.raises(ConfigError, match="got 1 ids and 2 rows"):
        StringVocabulary(PackedStrings.pack([b"a"]), np.arange(2, dtype=np.uint32))


def test_check_finds_a_string_that_lives_outside_the_table():
    with pytest.raises(DamagedArtifactError, match="a row outside the table's 2"):
        StringVocabulary.from_ids(["a", "b", "c"]).check(2)


BYTES, OFFSETS, ROWS = np.frombuffer(b"ab", np.uint8), np.arange(3), np.arange(2, dtype=np.uint32)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"id_bytes": BYTES, "id_offsets": OFFSETS},
        {"id_bytes": BYTES, "rows": ROWS},
        {"id_offsets": OFFSETS, "rows": ROWS},
        {"id_bytes": BYTES, "id_offsets": OFFSETS, "rows": ROWS.astype(np.int64)},
        {"id_bytes": BYTES, "id_offsets": OFFSETS, "rows": ROWS[:, None]},
        {"id_bytes": BYTES, "id_offsets": OFFSETS, "rows": ROWS[:1]},
        {"id_bytes": BYTES.view(np.int8), "id_offsets": OFFSETS, "rows": ROWS},
        {"id_bytes": BYTES, "id_offsets": OFFSETS.astype(np.uint32), "rows": ROWS},
        {"id_bytes": BYTES, "id_offsets": np.empty(0, np.int64), "rows": ROWS[:0]},
        {"id_bytes": BYTES, "id_offsets": OFFSETS[:2], "rows": ROWS[:1]},
        {"id_bytes": BYTES, "id_offsets": OFFSETS + 1, "rows": ROWS},
    ],
)
def test_load_vocabulary_calls_tensors_of_strings_that_do_not_fit_damaged(tensors):
    with pytest.raises(DamagedArtifactError):
        load_vocabulary("string", 2, tensors)


@pytest.mark.parametrize("num_ids", [0, 1, 300])
def test_string_vocabulary_without_slots_finds_what_one_with_slots_finds(num_ids):
    tensors = dict(StringVocabulary.from_ids([f"item_{i}" for i in range(num_ids)]).tensors())
    assert tensors.pop("id_slots").shape == (num_slots(num_ids),)
    without, wanted = load_vocabulary("string", num_ids, tensors), [f"item_{i}" for i in range(-3, num_ids + 3)]
    assert "id_slots" not in without.tensors()
    without.check(num_ids)
    assert without.rows(wanted).tolist() == without.indexed().rows(wanted).tolist()


@pytest.mark.parametrize("slots_H", [np.zeros(3, np.uint32), np.zeros(4, np.int64), np.zeros((4, 1), np.uint32)])
def test_load_vocabulary_calls_slots_that_do_not_fit_damaged(slots_H):
    tensors = {**StringVocabulary.from_ids(["a", "b"]).tensors(), "id_slots": slots_H}
    with pytest.raises(DamagedArtifactError, match="id_slots: got"):
        load_vocabulary("string", 2, tensors)


@pytest.mark.parametrize("at", range(7))
def test_check_finds_slots_that_are_not_those_of_the_ids(at):
    ids, rows_U = PackedStrings.pack([b"a", b"b", b"c", b"d"]), np.arange(4, dtype=np.uint32)
    slots_H = build_slots(*ids)
    StringVocabulary(ids, rows_U, slots_H).check(4)
    slots_H[at] ^= 8
    with pytest.raises(DamagedArtifactError, match="id_slots are not those of its ids"):
        StringVocabulary(ids, rows_U, slots_H).check(4)


@pytest.mark.parametrize("num_embeddings", [0, -1])
def test_modulo_vocabulary_of_no_rows_makes_no_sense(num_embeddings):
    with pytest.raises(ConfigError, match=f"modulo vocabulary: got {num_embeddings} rows, want 1 or more"):
        ModuloVocabulary(num_embeddings)


def test_load_vocabulary_calls_a_modulo_vocabulary_of_no_rows_damaged():
    with pytest.raises(DamagedArtifactError, match="modulo vocabulary: got 0 rows"):
        load_vocabulary("modulo", 0, {})
