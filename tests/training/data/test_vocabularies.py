from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_rec import ConfigError
from dpq_rec.kernels import MISSING_ROW
from training.data import columns, files
from training.data.columns import Values
from training.data.interactions import TEST, TRAIN, VALIDATION, Interactions
from training.data.vocabularies import VocabularyPolicy, build_vocabulary, count_ids

KINDS = {
    "int64": (pa.int64(), st.integers(-5, 5)),
    "string": (pa.string(), st.sampled_from(["", "a", "B", "é", "ab", "𝄞"])),
}


def open_columns(path, columns, row_group_size=None):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return Interactions.open(path, features=[name for name in columns if name not in ("user_id", "item_id", "split")])


def open_ids(path, ids, kind, splits=None):
    splits = [TRAIN] * len(ids) if splits is None else splits
    columns = {"user_id": np.arange(len(ids)), "item_id": pa.array(ids, KINDS[kind][0])}
    return open_columns(path, {**columns, "split": pa.array(splits, pa.int8())}, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabularies")


def by_falling_frequency(counter):
    return sorted(counter, key=lambda value: (-counter[value], value))


@pytest.mark.parametrize("kind", KINDS)
class TestExact:
    @settings(max_examples=60)
    @given(data=st.data(), piece_rows=st.integers(1, 9), min_count=st.integers(1, 4), rare_buckets=st.integers(1, 3))
    def test_is_the_counter_of_training_rows_with_rare_ids_in_the_last_rows(
        self, folder, kind, data, piece_rows, min_count, rare_buckets
    ):
        split = st.sampled_from([TRAIN, TRAIN, VALIDATION, TEST])
        rows = [*data.draw(st.lists(st.tuples(KINDS[kind][1], split), max_size=60)), (data.draw(KINDS[kind][1]), TRAIN)]
        ids, splits = map(list, zip(*rows, strict=True))
        interactions = open_ids(folder / f"{kind}.parquet", ids, kind, splits)
        counter = Counter(each for each, split in rows if split == TRAIN)
        ordered = by_falling_frequency(counter)
        frequent = [each for each in ordered if counter[each] >= min_count]
        expected = {each: row for row, each in enumerate(frequent)}
        for place, each in enumerate(ordered[len(frequent) :]):
            expected[each] = len(frequent) + place % rare_buckets
        policy = VocabularyPolicy(min_count=min_count, rare_buckets=rare_buckets if min_count > 1 else 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_PIECE_ROWS", piece_rows)
            patch.setattr(columns, "_MERGE_ROWS", piece_rows)
            ids_U, counts_U = count_ids(interactions, "item_id")
            vocabulary, counts_V = build_vocabulary(interactions, "item_id", policy)
        assert list(zip(ids_U.to_pylist(), counts_U.tolist(), strict=True)) == [
            (each, counter[each]) for each in ordered
        ]
        assert dict(zip(ordered, vocabulary.rows(ordered).tolist(), strict=True)) == expected
        want_V = [0] * (max(expected.values()) + 1)
        for each, row in expected.items():
            want_V[row] += counter[each]
        assert counts_V.tolist() == want_V
        vocabulary.check(len(counts_V))

    def test_gives_no_row_to_what_only_other_splits_have(self, tmp_path, kind):
        seen, unseen = {"int64": (3, 4), "string": ("seen", "unseen")}[kind]
        interactions = open_ids(tmp_path / "a.parquet", [seen, unseen, unseen], kind, [TRAIN, TEST, VALIDATION])
        for min_count in (1, 5):
            vocabulary = build_vocabulary(interactions, "item_id", VocabularyPolicy(min_count=min_count))[0]
            assert vocabulary.rows([seen, unseen]).tolist() == [0, MISSING_ROW]

    def test_rows_of_values_are_a_lookup_of_each_value(self, tmp_path, kind):
        ids = {"int64": [5, 3, 5, -1], "string": ["b", "a", "b", "ä"]}[kind]
        vocabulary = build_vocabulary(open_ids(tmp_path / "a.parquet", ids, kind), "item_id")[0]
        asked = [*ids, {"int64": 77, "string": "zz"}[kind], ids[0]]
        values = Values.of(pa.array(asked, {"int64": pa.int64(), "string": pa.large_string()}[kind]))
        assert values.rows(vocabulary).tolist() == [vocabulary.rows([each])[0] for each in asked]


def test_a_feature_has_rows_for_the_values_of_its_lists(tmp_path):
    columns = {"user_id": [1, 2, 3], "item_id": [1, 1, 1], "tags": [["b", "a", "b"], None, ["c", None]]}
    interactions = open_columns(tmp_path / "a.parquet", {**columns, "split": pa.array([0, 0, 2], pa.int8())})
    assert build_vocabulary(interactions, "tags")[0].rows(["b", "a", "c"]).tolist() == [0, 1, MISSING_ROW]


def test_a_feature_without_a_training_value_is_refused(tmp_path):
    columns = {"user_id": [1, 2], "item_id": [1, 1], "tags": pa.array([[], ["c"]], pa.list_(pa.string()))}
    interactions = open_columns(tmp_path / "a.parquet", {**columns, "split": pa.array([0, 2], pa.int8())})
    with pytest.raises(ConfigError, match="tags: got no value in the training rows among 2 interactions"):
        build_vocabulary(interactions, "tags")


class TestModulo:
    def test_puts_ids_in_the_row_of_their_remainder(self, tmp_path):
        interactions = open_ids(tmp_path / "a.parquet", [10, 3, -1, 3, 17], "int64")
        vocabulary, counts_V = build_vocabulary(interactions, "item_id", VocabularyPolicy(kind="modulo", num_buckets=7))
        assert vocabulary.rows([10, 3, -1, 1_000]).tolist() == [3, 3, 6, 1_000 % 7]
        assert counts_V.tolist() == [0, 0, 0, 4, 0, 0, 1]

    def test_refuses_strings_with_the_reason(self, tmp_path):
        interactions = open_ids(tmp_path / "a.parquet", ["a"], "string")
        with pytest.raises(
            ConfigError, match="item_id: got strings and the vocabulary kind modulo, want exact: strings"
        ):
            build_vocabulary(interactions, "item_id", VocabularyPolicy(kind="modulo", num_buckets=7))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "hash"}, "kind: got 'hash', want exact or modulo"),
        ({"min_count": 0}, "min_count: got 0, want at least 1"),
        ({"min_count": 2, "rare_buckets": 0}, "rare_buckets: got 0, want at least 1"),
        ({"kind": "modulo"}, "num_buckets: got None for modulo; modulo needs it"),
        ({"num_buckets": 5}, "num_buckets: got 5 for exact; modulo needs it, exact takes none"),
        ({"kind": "modulo", "num_buckets": 5, "min_count": 2}, "min_count: got 2 for modulo, want 1"),
        ({"rare_buckets": 3}, "rare_buckets: got 3, min_count 1; want min_count of 2 or more"),
    ],
)
def test_policy_refuses(wrong, message):
    with pytest.raises(ConfigError, match=message):
        VocabularyPolicy(**wrong)
