import logging
import os
import tracemalloc
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_rec import ConfigError, IdentityVocabulary, Int64Vocabulary
from training.data import files, splits
from training.data import vocabularies as vocabularies_module
from training.data.batches import train_batches
from training.data.interactions import Interactions, held_out
from training.data.splits import TEST, TRAIN, VALIDATION
from training.data.vocabularies import build_vocabulary, count_ids

DATA = Path(os.environ.get("TEST_DATA_DIR", Path(__file__).parents[4] / "shared" / "data"))


def write(path, columns, row_group_size=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def set_piece_rows(patch, piece_rows):
    """Small pieces, merged often."""
    patch.setattr(files, "_PIECE_ROWS", piece_rows)
    patch.setattr(splits, "_MERGE_ROWS", piece_rows)
    patch.setattr(vocabularies_module, "_MERGE_IDS", piece_rows)


def list_of(values):
    return values.distinct_D.take(values.codes_T).tolist()


def ids_by_row(interactions, column):
    return count_ids(interactions, column).ids_U.tolist()


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
    @settings(deadline=None, max_examples=60)
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

    @settings(deadline=None, max_examples=60)
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
        assert list_of(held_out(interactions, TEST).items) == [4]

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
        names = [group.path.name for group in Interactions.open(tmp_path).row_groups]
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
        assert list_of(held_out(interactions, VALIDATION).items) == []

    def test_takes_narrower_integers(self, tmp_path):
        users = pa.array([1, 2**32 - 1], pa.uint32())
        write(tmp_path / "a.parquet", {"user_id": users, "item_id": pa.array([3, 4], pa.int32())})
        assert ids_by_row(Interactions.open(tmp_path), "user_id") == [1, 2**32 - 1]

    def test_reads_no_rows_from_an_empty_file(self, tmp_path):
        write(tmp_path / "a.parquet", {"user_id": pa.array([], pa.int64()), "item_id": pa.array([], pa.int64())})
        interactions = Interactions.open(tmp_path)
        assert interactions.count_splits() == (0, 0, 0)
        assert list_of(held_out(interactions, TEST).users) == []
        with pytest.raises(ConfigError, match="user_id: got no value in the training rows among 0 interactions"):
            build_vocabulary(interactions, "user_id")

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"item_id": [1]}, r"no Parquet file at .* has both user_id and item_id; found: a.parquet \(item_id\)"),
            ({"user_id": [["u"]], "item_id": [1]}, "user_id: got list<.*>, want int64 or string"),
            ({"user_id": [1], "item_id": pa.array([1], pa.uint64())}, "item_id: got uint64, want int64"),
            ({"user_id": [1], "item_id": [1.0]}, "item_id: got double, want int64"),
            ({"user_id": [1], "item_id": [1], "split": ["test"]}, "split: got string, want int8"),
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
            held_out(Interactions.open(tmp_path), TEST)

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
    @settings(deadline=None, max_examples=40)
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
        assert build_vocabulary(interactions, "user_id").num_embeddings == 6_040
        assert build_vocabulary(interactions, "item_id").num_embeddings == 3_416


def vocabularies(interactions):
    return {c: build_vocabulary(interactions, c).vocabulary for c in ("user_id", "item_id")}


def numbered(path, num_rows, row_group_size, splits=None):
    """Interactions whose user and item ids tell the row: 1000 + row and row * row."""
    rows = np.arange(num_rows)
    splits = np.zeros(num_rows, np.int8) if splits is None else np.array(splits, np.int8)
    return Interactions.open(
        write(path, {"user_id": rows + 1000, "item_id": rows * rows, "split": splits}, row_group_size)
    )


def rows_of(batches):
    return [batch.bags["user_id"].rows_T.tolist() for batch in batches]


class TestTrainBatches:
    @settings(deadline=None, max_examples=80)
    @given(
        splits=st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=1, max_size=200),
        row_group_size=st.integers(1, 60),
        batch_size=st.integers(1, 9),
        world_size=st.integers(1, 3),
        window_rows=st.integers(1, 100),
        shuffle=st.booleans(),
    )
    def test_gives_every_training_row_once_over_all_ranks(
        self, folder, splits, row_group_size, batch_size, world_size, window_rows, shuffle
    ):
        interactions = numbered(folder / "once.parquet", len(splits), row_group_size, splits)
        num_train = splits.count(TRAIN)
        if num_train < batch_size * world_size:
            return
        known = vocabularies(interactions)
        ranks = [
            list(
                train_batches(
                    interactions,
                    known,
                    batch_size=batch_size,
                    rank=rank,
                    world_size=world_size,
                    seed=3,
                    epoch=5,
                    shuffle=shuffle,
                    window_rows=window_rows,
                )
            )
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in ranks} == {num_train // (batch_size * world_size)}
        assert {len(bag.rows_T) for batches in ranks for batch in batches for bag in batch.bags.values()} == {
            batch_size
        }
        users = np.concatenate([batch.bags["user_id"].rows_T for batches in ranks for batch in batches])
        items = np.concatenate([batch.bags["item_id"].rows_T for batches in ranks for batch in batches])
        rows = np.sort(known["user_id"].ids_U)[users] - 1000
        train = np.flatnonzero(np.array(splits) == TRAIN)
        assert len(np.unique(rows)) == len(rows) > num_train - batch_size * world_size
        assert np.isin(rows, train).all()
        assert (known["item_id"].rows(rows * rows) == items).all()

    def test_without_shuffle_alternates_batches_in_file_order(self, tmp_path):
        interactions = numbered(tmp_path / "a.parquet", 10, 3)
        known = vocabularies(interactions)
        ranks = [
            rows_of(train_batches(interactions, known, batch_size=2, rank=r, world_size=2, shuffle=False))
            for r in (0, 1)
        ]
        assert ranks == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]

    def test_depends_on_seed_and_epoch_alone(self, tmp_path):
        interactions = numbered(tmp_path / "a.parquet", 500, 50)
        known = vocabularies(interactions)
        orders = [
            rows_of(train_batches(interactions, known, batch_size=7, seed=seed, epoch=epoch, window_rows=120))
            for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
        ]
        assert orders[0] == orders[1]
        assert orders[0] != orders[2] != orders[3] != orders[0]

    def test_drops_other_rows_in_each_epoch(self, tmp_path):
        interactions = numbered(tmp_path / "a.parquet", 103, 10)
        known = vocabularies(interactions)
        dropped = {
            frozenset(
                set(range(103)) - set(np.ravel(rows_of(train_batches(interactions, known, batch_size=10, epoch=e))))
            )
            for e in range(4)
        }
        assert {len(rows) for rows in dropped} == {3}
        assert len(dropped) > 1

    def test_mixes_data_within_a_window_completely(self, tmp_path):
        interactions = numbered(tmp_path / "a.parquet", 20_000, 1_000)
        order = np.ravel(rows_of(train_batches(interactions, vocabularies(interactions), batch_size=100)))
        assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03
        assert np.abs(np.diff(order)).mean() == pytest.approx(20_000 / 3, rel=0.05)

    def test_mixes_several_row_groups_where_data_exceed_the_window(self, tmp_path):
        interactions = numbered(tmp_path / "a.parquet", 20_000, 500)
        known = vocabularies(interactions)
        batches = rows_of(train_batches(interactions, known, batch_size=100, window_rows=4_000))
        assert min(len({row // 500 for row in batch}) for batch in batches) >= 7
        assert max(batches[0]) - min(batches[0]) > 5_000

    def test_holds_a_window_not_the_data(self, tmp_path):
        num_rows = 1 << 21
        interactions = numbered(tmp_path / "a.parquet", num_rows, 1 << 15)
        known = {"user_id": IdentityVocabulary(1 << 40), "item_id": IdentityVocabulary(1 << 43)}
        before_bytes, arrow_bytes = pa.total_allocated_bytes(), 0
        tracemalloc.start()
        try:
            for _ in train_batches(interactions, known, batch_size=1024, window_rows=1 << 15):
                arrow_bytes = max(arrow_bytes, pa.total_allocated_bytes() - before_bytes)
            peak_bytes = tracemalloc.get_traced_memory()[1] + arrow_bytes
        finally:
            tracemalloc.stop()
        assert peak_bytes < num_rows * 16 / 4

    def test_refuses_more_than_there_is(self, tmp_path):
        interactions = numbered(tmp_path / "a.parquet", 7, 3)
        batches = train_batches(interactions, vocabularies(interactions), batch_size=4, world_size=2)
        with pytest.raises(
            ConfigError, match=r"batch_size: got 4 on each of 2 rank\(s\), 7 training rows; want at most 3"
        ):
            next(batches)

    def test_refuses_a_vocabulary_of_other_data(self, tmp_path):
        interactions = numbered(tmp_path / "a.parquet", 7, 3)
        known = {"user_id": Int64Vocabulary.from_ids([1000]), "item_id": IdentityVocabulary(1000)}
        with pytest.raises(
            ConfigError, match=r"user_id: got 2 values of training rows that are not in the vocabulary, 100[12] for one"
        ):
            next(train_batches(interactions, known, batch_size=1, shuffle=False))


def test_integers_that_a_double_cannot_hold_are_rounded(tmp_path):
    columns = {"user_id": [1, 2], "item_id": [1, 2], "big": pa.array([2**53 + 1, -(2**63)], pa.int64())}
    interactions = Interactions.open(write(tmp_path / "a.parquet", columns), features=["big"])
    (piece,) = interactions.scan(["big"])
    assert piece.numbers["big"].tolist() == [2.0**53, -(2.0**63)]
