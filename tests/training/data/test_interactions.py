import logging
import os
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_rec import ConfigError
from training.data import columns, files
from training.data.interactions import TEST, TRAIN, VALIDATION, Interactions
from training.data.vocabularies import build_vocabulary, count_ids

DATA = Path(os.environ.get("TEST_DATA_DIR", Path(__file__).parents[4] / "shared" / "data"))


def write(path, columns, row_group_size=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def set_piece_rows(patch, piece_rows):
    """Small pieces, merged often."""
    patch.setattr(files, "_PIECE_ROWS", piece_rows)
    patch.setattr(columns, "_MERGE_ROWS", piece_rows)


def list_of(values):
    return values.distinct_D.take(values.codes_T).tolist()


def ids_by_row(interactions, column):
    return count_ids(interactions, column)[0].tolist()


def splits_of(interactions):
    pieces = [piece.splits_N for piece in interactions.scan(("user_id",))]
    return np.concatenate([np.empty(0, np.int8), *pieces]).tolist()


def naive_splits(users, times):
    rows_of = defaultdict(list)
    for row in sorted(range(len(users)), key=lambda row: (times[row], row)):
        rows_of[users[row]].append(row)
    splits = [TRAIN] * len(users)
    for rows in rows_of.values():
        if len(rows) > 1:
            splits[rows[-1]] = TEST
        if len(rows) > 2:
            splits[rows[-2]] = VALIDATION
    return splits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("interactions")


class TestDefaultSplit:
    @settings(max_examples=60)
    @given(
        users=st.one_of(
            st.lists(st.integers(-3, 5), min_size=1, max_size=60),
            st.lists(st.sampled_from(["", "b", "a", "ä"]), min_size=1, max_size=60),
        ),
        piece_rows=st.integers(1, 7),
        group_rows=st.integers(1, 20),
    )
    def test_follows_row_order(self, folder, users, piece_rows, group_rows):
        write(folder / "order.parquet", {"user_id": users, "item_id": users}, group_rows)
        with pytest.MonkeyPatch.context() as patch:
            set_piece_rows(patch, piece_rows)
            found = splits_of(Interactions.open(folder / "order.parquet"))
        assert found == naive_splits(users, [0] * len(users))

    @settings(max_examples=60)
    @given(
        rows=st.lists(st.tuples(st.integers(0, 4), st.integers(-2, 3)), min_size=1, max_size=60),
        piece_rows=st.integers(1, 7),
        kind=st.sampled_from([pa.int64(), pa.float64(), pa.timestamp("ms")]),
    )
    def test_follows_timestamps_and_equal_ones_row_order(self, folder, rows, piece_rows, kind):
        users, times = zip(*rows, strict=True)
        columns = {"user_id": users, "item_id": users, "timestamp": pa.array(times).cast(kind)}
        write(folder / "time.parquet", columns)
        with pytest.MonkeyPatch.context() as patch:
            set_piece_rows(patch, piece_rows)
            found = splits_of(Interactions.open(folder / "time.parquet"))
        assert found == naive_splits(users, times)

    def test_spans_files_in_path_order(self, tmp_path):
        write(tmp_path / "b.parquet", {"user_id": [1, 1], "item_id": [3, 4]})
        write(tmp_path / "a" / "z.parquet", {"user_id": [1, 1], "item_id": [1, 2]})
        interactions = Interactions.open(tmp_path)
        assert splits_of(interactions) == [TRAIN, TRAIN, VALIDATION, TEST]
        assert list_of(interactions.read_ids(TEST)[1]) == [4]

    def test_of_two_items_one_trains_and_one_tests_and_a_single_one_trains(self, tmp_path):
        write(tmp_path / "a.parquet", {"user_id": [1, 2, 2], "item_id": [1, 1, 2]})
        assert splits_of(Interactions.open(tmp_path)) == [TRAIN, TRAIN, TEST]

    def test_gives_way_to_the_split_column(self, tmp_path):
        columns = {"user_id": [1, 1, 1], "item_id": [1, 2, 3], "split": pa.array([2, 1, 0], pa.int8())}
        write(tmp_path / "a.parquet", {**columns, "timestamp": [1, 2, 3]})
        assert splits_of(Interactions.open(tmp_path)) == [2, 1, 0]

    def test_is_right_for_rows_read_in_another_order(self, tmp_path):
        users = [1, 2, 1, 2, 1, 2, 1, 1, 2]
        write(tmp_path / "a.parquet", {"user_id": users, "item_id": users}, 2)
        interactions = Interactions.open(tmp_path)
        backwards = [p.splits_N for p in interactions.scan(("item_id",), interactions.row_groups[::-1])]
        assert np.concatenate(backwards[::-1]).tolist() == naive_splits(users, users)

    def test_reproduces_the_published_split_of_movielens_1m(self, tmp_path):
        source = DATA / "movielens_1m" / "interactions.parquet"
        if not source.exists():
            pytest.skip(f"no {source}: set TEST_DATA_DIR")
        table = pq.read_table(source)
        write(tmp_path / "a.parquet", {name: table[name] for name in ("user_id", "item_id")}, 100_000)
        assert splits_of(Interactions.open(tmp_path)) == table["split"].to_pylist()


class TestOpen:
    def test_ignores_and_names_files_without_interactions(self, tmp_path, caplog):
        write(tmp_path / "a.parquet", {"user_id": [1], "item_id": [2]})
        write(tmp_path / "items.parquet", {"item_id": [2], "title": ["x"]})
        with caplog.at_level(logging.INFO, "training.data.interactions"):
            assert Interactions.open(tmp_path).num_rows == 1
        assert "items.parquet: it has no column user_id" in caplog.text

    def test_leaves_out_hidden_and_underscored_names(self, tmp_path):
        for name in ("a.parquet", "_b.parquet", ".c.parquet", "_tmp/d.parquet", "e.csv", "sub/f.parquet"):
            write(tmp_path / name, {"user_id": [1], "item_id": [2]})
        names = [group.file.path.name for group in Interactions.open(tmp_path).row_groups]
        assert names == ["a.parquet", "f.parquet"]

    def test_counts_splits_alike_with_and_without_a_split_column(self, tmp_path):
        columns = {"user_id": [1, 1, 1, 2], "item_id": [1, 2, 3, 4]}
        write(tmp_path / "a.parquet", columns)
        write(tmp_path / "b.parquet", {**columns, "split": pa.array([0, 1, 2, 0], pa.int8())})
        for name in ("a", "b"):
            assert Interactions.open(tmp_path / f"{name}.parquet").count_splits() == (2, 1, 1)

    @pytest.mark.parametrize("split", [{}, {"split": pa.array([0, 1, 2, 0, 1, 2, 0], pa.int8())}])
    def test_lets_the_validation_split_train(self, tmp_path, split):
        columns = {"user_id": [1, 1, 1, 2, 2, 2, 3], "item_id": [1, 2, 3, 1, 4, 5, 1]}
        write(tmp_path / "a.parquet", {**columns, **split})
        interactions = Interactions.open(tmp_path, validation_trains=True)
        assert splits_of(interactions) == [TRAIN, TRAIN, TEST, TRAIN, TRAIN, TEST, TRAIN]
        assert interactions.count_splits() == (5, 0, 2)
        assert sorted(ids_by_row(interactions, "item_id")) == [1, 2, 4]
        assert list_of(interactions.read_ids(VALIDATION)[1]) == []

    def test_takes_narrower_integers(self, tmp_path):
        users = pa.array([1, 2**32 - 1], pa.uint32())
        write(tmp_path / "a.parquet", {"user_id": users, "item_id": pa.array([3, 4], pa.int32())})
        assert ids_by_row(Interactions.open(tmp_path), "user_id") == [1, 2**32 - 1]

    def test_reads_no_rows_from_an_empty_file(self, tmp_path):
        write(tmp_path / "a.parquet", {"user_id": pa.array([], pa.int64()), "item_id": pa.array([], pa.int64())})
        interactions = Interactions.open(tmp_path)
        assert interactions.count_splits() == (0, 0, 0)
        assert list_of(interactions.read_ids(TEST)[0]) == []
        with pytest.raises(ConfigError, match="user_id: got no value in the training rows among 0 interactions"):
            build_vocabulary(interactions, "user_id")

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"item_id": [1]}, r"no Parquet file at .* has both user_id and item_id; found: a.parquet \(item_id\)"),
            ({"user_id": [["u"]], "item_id": [1]}, "user_id: got list<.*>, want int64 or string"),
            ({"user_id": [1], "item_id": pa.array([1], pa.uint64())}, "item_id: got uint64, want int64"),
            ({"user_id": [1], "item_id": [1.0]}, "item_id: got double, want int64"),
            ({"user_id": [1], "item_id": [1], "split": ["test"]}, "split: got string, want int8, 0 .train., 1"),
            ({"user_id": [1], "item_id": [1], "timestamp": ["1"]}, "timestamp: got string, want a number"),
        ],
    )
    def test_refuses_columns(self, tmp_path, columns, message):
        write(tmp_path / "a.parquet", columns)
        with pytest.raises(ConfigError, match=message):
            Interactions.open(tmp_path)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"user_id": [1, None, None], "item_id": [1, 2, 3]}, "user_id: got 2 nulls"),
            ({"user_id": [1, 2, 3], "item_id": [1, None, 3]}, "item_id: got 1 nulls"),
            ({"user_id": [1, 2], "item_id": [1, 2], "split": [0, None]}, "split: got 1 nulls"),
            ({"user_id": [1, 2], "item_id": [1, 2], "split": [0, 3]}, "split: got 3 in .*a.parquet, want 0"),
            ({"user_id": [1, 2], "item_id": [1, 2], "timestamp": [0.0, np.nan]}, "timestamp: got 1 nulls"),
            ({"user_id": [1], "item_id": [1], "timestamp": pa.array([None], pa.int64())}, "timestamp: got 1 nulls"),
        ],
    )
    def test_refuses_values_as_it_reads_them(self, tmp_path, columns, message):
        write(tmp_path / "a.parquet", columns)
        with pytest.raises(ConfigError, match=message):
            Interactions.open(tmp_path).read_ids(TEST)

    @pytest.mark.parametrize("extra", [{"split": [0]}, {"timestamp": [datetime(2020, 1, 1)]}])
    def test_refuses_files_that_are_not_alike(self, tmp_path, extra):
        write(tmp_path / "a.parquet", {"user_id": [1], "item_id": [1]})
        write(tmp_path / "b.parquet", {"user_id": [1], "item_id": [1], **extra})
        with pytest.raises(ConfigError, match=rf"{next(iter(extra))}: got none in .*a.parquet.*; want the same"):
            Interactions.open(tmp_path)

    def test_refuses_what_is_not_there(self, tmp_path):
        with pytest.raises(ConfigError, match="absent does not exist"):
            Interactions.open(tmp_path / "absent")
        with pytest.raises(ConfigError, match="found: none"):
            Interactions.open(tmp_path)

    def test_refuses_a_file_that_is_no_parquet(self, tmp_path):
        write(tmp_path / "a.parquet", {"user_id": [1], "item_id": [1]})
        (tmp_path / "b.parquet").write_bytes(b"not Parquet at all")
        with pytest.raises(ConfigError, match=r"b.parquet cannot be read as Parquet"):
            Interactions.open(tmp_path)

    def test_names_the_file_that_is_damaged_inside(self, tmp_path):
        numbers = np.random.default_rng(0).integers(0, 1 << 60, 5000)
        path = write(tmp_path / "a.parquet", {"user_id": numbers, "item_id": numbers, "split": np.zeros(5000, np.int8)})
        interactions = Interactions.open(path)
        damaged = bytearray(path.read_bytes())
        damaged[4:2000] = b"\xff" * 1996
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"a.parquet cannot be read"):
            build_vocabulary(interactions, "user_id")


class TestBuildVocabulary:
    @settings(max_examples=40)
    @given(
        rows=st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 2)), min_size=1, max_size=60),
        piece_rows=st.integers(1, 9),
    )
    def test_orders_training_ids_by_falling_frequency_then_id(self, folder, rows, piece_rows):
        rows = [*rows, (77, TRAIN)]
        ids, splits = zip(*rows, strict=True)
        write(folder / "counts.parquet", {"user_id": ids, "item_id": ids, "split": pa.array(splits, pa.int8())})
        train = [i for i, split in rows if split == TRAIN]
        with pytest.MonkeyPatch.context() as patch:
            set_piece_rows(patch, piece_rows)
            found = ids_by_row(Interactions.open(folder / "counts.parquet"), "item_id")
        assert found == sorted(set(train), key=lambda i: (-train.count(i), i))

    def test_of_movielens_1m_makes_a_vocabulary(self):
        if not (DATA / "movielens_1m").exists():
            pytest.skip(f"no {DATA / 'movielens_1m'}: set TEST_DATA_DIR")
        interactions = Interactions.open(DATA / "movielens_1m")
        assert interactions.count_splits() == (987_531, 6_040, 6_040)
        assert len(build_vocabulary(interactions, "user_id")[1]) == 6_040
        assert len(build_vocabulary(interactions, "item_id")[1]) == 3_416


def test_integers_that_a_double_cannot_hold_are_rounded(tmp_path):
    columns = {"user_id": [1, 2], "item_id": [1, 2], "big": pa.array([2**53 + 1, -(2**63)], pa.int64())}
    interactions = Interactions.open(write(tmp_path / "a.parquet", columns), features=["big"])
    (piece,) = interactions.scan(["big"])
    assert piece.numbers["big"].tolist() == [2.0**53, -(2.0**63)]
