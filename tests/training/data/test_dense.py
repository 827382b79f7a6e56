import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpq_rec import ConfigError
from training.data import files
from training.data.dense import dense_statistics
from training.data.interactions import Interactions


def open_numbers(path, columns, splits):
    ids = np.arange(len(splits))
    pq.write_table(pa.table({"user_id": ids, "item_id": ids, "split": pa.array(splits, pa.int8()), **columns}), path)
    return Interactions.open(path, features=list(columns))


def test_statistics_are_numpys_of_the_training_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE_ROWS", 7)
    rng = np.random.default_rng(0)
    splits = np.array([0, 0, 1, 2] * 25)
    far = (1e6 + rng.normal(size=100)).astype(np.float32)  # a sum of squares would lose all of its digits
    counts = rng.integers(-5, 5, 100)
    means_F, stds_F = dense_statistics(open_numbers(tmp_path / "a.parquet", {"far": far, "counts": counts}, splits))
    train = np.stack([far, counts], 1).astype(np.float64)[splits == 0]
    np.testing.assert_allclose(means_F, train.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stds_F, train.std(0), rtol=1e-9)


def test_missing_numbers_count_as_0_and_in_the_log(tmp_path, caplog):
    columns = {"age": [4.0, None, float("nan"), 8.0, None], "same": [3, 3, 3, 3, 3]}
    interactions = open_numbers(tmp_path / "a.parquet", columns, [0, 0, 0, 0, 2])
    with caplog.at_level(logging.WARNING, "training.data.dense"):
        means_F, stds_F = dense_statistics(interactions)
    assert means_F.tolist() == [3, 3]
    assert stds_F.tolist() == [np.std([4, 0, 0, 8]), 1]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["age: 2 of 4 training rows have no number; they count as 0"]


def test_statistics_of_no_features_are_empty_and_of_no_rows_refused(tmp_path):
    assert [len(each) for each in dense_statistics(open_numbers(tmp_path / "a.parquet", {}, [0]))] == [0, 0]
    with pytest.raises(ConfigError, match="age: got no training rows among 1 interactions"):
        dense_statistics(open_numbers(tmp_path / "b.parquet", {"age": [1.0]}, [2]))


@pytest.mark.parametrize(
    "seconds",
    [
        lambda offsets: pa.array(1_700_000_000 + offsets),
        lambda offsets: pa.array(1.7e9 + offsets),
        lambda offsets: pa.array(1_700_000_000 + offsets).cast(pa.decimal128(20, 0)),
    ],
    ids=["int64", "float64", "decimal"],
)
def test_seconds_since_1970_keep_their_digits(tmp_path, seconds):
    offsets = np.arange(100) % 7
    means_F, stds_F = dense_statistics(open_numbers(tmp_path / "a.parquet", {"at": seconds(offsets)}, [0] * 100))
    np.testing.assert_allclose(means_F - 1_700_000_000, offsets.mean(), rtol=1e-6)
    np.testing.assert_allclose(stds_F, offsets.std(), rtol=1e-12)


@pytest.mark.parametrize("number", [0.1, 1.7e18 + 256, -1e-30, 1e30])
def test_a_number_that_is_the_same_everywhere_deviates_by_nothing(tmp_path, monkeypatch, number):
    monkeypatch.setattr(files, "_PIECE_ROWS", 7)
    means_F, stds_F = dense_statistics(open_numbers(tmp_path / "a.parquet", {"same": [number] * 100}, [0] * 100))
    assert (means_F.tolist(), stds_F.tolist()) == ([number], [1])
