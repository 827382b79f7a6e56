"""Training batches: each row once over all ranks, mixed within a window, and never more of the data than that."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_rec import ConfigError, IdentityVocabulary, Int64Vocabulary
from training.data.batches import train_batches
from training.data.interactions import TRAIN, Interactions
from training.data.vocabularies import build_vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("interactions")


def vocabularies(interactions):
    return {c: build_vocabulary(interactions, c)[0] for c in ("user_id", "item_id")}


def numbered(path, num_rows, row_group_size, splits=None):
    """Interactions whose user and item ids tell the row: 1000 + row and row * row."""
    rows = np.arange(num_rows)
    splits = np.zeros(num_rows, np.int8) if splits is None else np.array(splits, np.int8)
    columns = {"user_id": rows + 1000, "item_id": rows * rows, "split": splits}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return Interactions.open(path)


def rows_of(batches):
    return [batch.bags["user_id"].rows_T.tolist() for batch in batches]


class TestTrainBatches:
    @settings(max_examples=80)
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
