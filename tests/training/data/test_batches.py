import decimal
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_rec import ConfigError
from training.data import files
from training.data.batches import eval_batches, train_batches
from training.data.interactions import TEST, TRAIN, VALIDATION, Interactions
from training.data.vocabularies import build_vocabulary

WORDS = ["x", "y", "", "ü"]
TEXT = st.one_of(st.none(), st.sampled_from(WORDS))
ROW = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(["u1", "u2", "u3"]),
        "item_id": st.integers(-2, 2),
        "split": st.sampled_from([TRAIN, TRAIN, VALIDATION, TEST]),
        "label": st.sampled_from([0.0, 1.0]),
        "age": st.one_of(st.none(), st.integers(-100, 100)),
        "price": st.one_of(st.none(), st.just(float("nan")), st.floats(-1e6, 1e6, width=32)),
        "is_new": st.one_of(st.none(), st.booleans()),
        "word": TEXT,
        "coded": TEXT,
        "words": st.one_of(st.none(), st.lists(TEXT, max_size=3)),
        "numbers": st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=3)),
    }
)
CODED = pa.dictionary(pa.int8(), pa.string())
SCHEMA = pa.schema(
    {
        "user_id": pa.large_string(),
        "item_id": pa.int16(),
        "split": pa.int8(),
        "label": pa.float64(),
        "age": pa.int32(),
        "price": pa.float32(),
        "is_new": pa.bool_(),
        "word": pa.string(),
        "coded": CODED,
        "words": pa.list_(pa.string()),
        "numbers": pa.large_list(pa.int8()),
    }
)
CATEGORICAL = ("word", "coded", "words", "numbers")
DENSE = ("age", "price", "is_new")


def write_rows(path, rows, row_group_size):
    """Two files, so that batches span them."""
    path.mkdir(exist_ok=True)
    for name, part in (("a", rows[: len(rows) // 2]), ("b", rows[len(rows) // 2 :])):
        pq.write_table(pa.Table.from_pylist(part, SCHEMA), path / f"{name}.parquet", row_group_size=row_group_size)


def values_of(row, name):
    """The bag of a row, by a plain reading of the contract."""
    value = row[name]
    values = value if isinstance(value, list) else [value]
    return [each for each in values or [] if each is not None]


def number_of(value):
    return 0.0 if value is None or value != value else float(value)


def unbag(bag, names_of_rows):
    ends = bag.offsets
    assert ends[-1] == len(bag.rows_T)
    assert bag.rows_T.dtype == ends.dtype == np.int64
    return [[names_of_rows[row] for row in bag.rows_T[a:b].tolist()] for a, b in itertools.pairwise(ends)]


def plain(batch, names):
    """Each example of a batch as (bags by column, dense numbers, label)."""
    bags = {name: unbag(bag, names[name]) for name, bag in batch.bags.items()}
    assert (batch.dense_BF.dtype, batch.labels_B.dtype) == (np.float64, np.float32)
    assert {len(each) for each in bags.values()} == {batch.num_examples} == {len(batch.labels_B)}
    return [
        ({name: each[i] for name, each in bags.items()}, batch.dense_BF[i].tolist(), float(batch.labels_B[i]))
        for i in range(batch.num_examples)
    ]


def expected_examples(rows, seen):
    """In evaluation, values that are not in the training split are absent."""
    columns = ("user_id", "item_id", *CATEGORICAL)
    return [
        (
            {name: [each for each in values_of(row, name) if each in seen[name]] for name in columns},
            [number_of(row[name]) for name in DENSE],
            row["label"],
        )
        for row in rows
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("batches")


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(ROW, max_size=40),
    group_rows=st.integers(1, 20),
    piece_rows=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    window_rows=st.integers(1, 50),
)
def test_batches_hold_what_a_plain_loop_over_rows_finds(
    folder, rows, group_rows, piece_rows, batch_size, world_size, window_rows
):
    full = {"split": TRAIN, "label": 1.0, "age": 1, "price": 1.0, "is_new": True, "word": "x", "coded": "x"}
    rows = [*rows, {**full, "user_id": "u1", "item_id": 0, "words": ["x"], "numbers": [0]}]
    write_rows(folder / "data", rows, group_rows)
    train = [row for row in rows if row["split"] == TRAIN]
    batch_size = min(batch_size, max(1, len(train) // world_size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_PIECE_ROWS", piece_rows)
        features = ("age", "word", "price", "coded", "words", "is_new", "numbers")
        interactions = Interactions.open(folder / "data", features=features, label=True)
        assert (interactions.categorical_features, interactions.dense_features) == (CATEGORICAL, DENSE)
        vocabularies = {name: build_vocabulary(interactions, name)[0] for name in interactions.id_kinds}
        seen = {name: {each for row in train for each in values_of(row, name)} for name in vocabularies}
        names = {
            name: dict(zip(vocabulary.rows(list(seen[name])).tolist(), seen[name], strict=True))
            for name, vocabulary in vocabularies.items()
        }
        if len(train) >= world_size:
            ranks = [
                list(
                    train_batches(
                        interactions,
                        vocabularies,
                        batch_size=batch_size,
                        rank=rank,
                        world_size=world_size,
                        window_rows=window_rows,
                    )
                )
                for rank in range(world_size)
            ]
            left = expected_examples(train, seen)
            for example in [each for batches in ranks for batch in batches for each in plain(batch, names)]:
                left.remove(example)
            assert len(left) == len(train) % (batch_size * world_size)
        for split in (TRAIN, VALIDATION, TEST):
            ranks = [
                list(
                    eval_batches(
                        interactions, vocabularies, split, batch_size=batch_size, rank=rank, world_size=world_size
                    )
                )
                for rank in range(world_size)
            ]
            assert len({len(batches) for batches in ranks}) == 1
            found = [each for step in zip(*ranks, strict=True) for batch in step for each in plain(batch, names)]
            assert found == expected_examples([row for row in rows if row["split"] == split], seen)


class TestEvalBatches:
    def test_shares_the_last_rows_out_so_that_every_rank_has_as_many_batches(self, tmp_path):
        rows = [{"user_id": "u", "item_id": 1, "split": TRAIN, "label": 1.0, "age": row} for row in range(13)]
        write_rows(tmp_path, rows, 4)
        interactions = Interactions.open(tmp_path, features=("age",), label=True)
        known = {name: build_vocabulary(interactions, name)[0] for name in ("user_id", "item_id")}
        ranks = [
            [
                batch.dense_BF[:, 0].tolist()
                for batch in eval_batches(interactions, known, TRAIN, batch_size=2, rank=rank, world_size=3)
            ]
            for rank in range(3)
        ]
        assert ranks == [[[0, 1], [6, 7], [12]], [[2, 3], [8, 9], []], [[4, 5], [10, 11], []]]

    def test_has_no_batches_of_a_split_without_rows(self, tmp_path):
        write_rows(tmp_path, [{"user_id": "u", "item_id": 1, "split": TRAIN, "label": 1.0}], 4)
        interactions = Interactions.open(tmp_path)
        known = {name: build_vocabulary(interactions, name)[0] for name in ("user_id", "item_id")}
        assert list(eval_batches(interactions, known, TEST, batch_size=2)) == []


def test_batches_without_features_and_label_have_neither(tmp_path):
    write_rows(tmp_path, [{"user_id": "u", "item_id": 1, "split": TRAIN, "label": 1.0}], 4)
    interactions = Interactions.open(tmp_path)
    known = {name: build_vocabulary(interactions, name)[0] for name in ("user_id", "item_id")}
    (batch,) = train_batches(interactions, known, batch_size=1)
    assert set(batch.bags) == {"user_id", "item_id"}
    assert batch.dense_BF.shape == (1, 0)
    assert batch.labels_B is None


class TestFeatures:
    @pytest.mark.parametrize(
        ("column", "kind"),
        [
            (pa.array([1, 2], pa.uint64()), "dense"),
            (pa.array([decimal.Decimal("1.5"), None]), "dense"),
            (pa.array([decimal.Decimal("1700000000.25"), None], pa.decimal128(20, 2)), "dense"),
            (pa.array([1_700_000_001, None]), "dense"),
            (pa.array([1.5, 2], pa.float16()), "dense"),
            (pa.array([[1, 2], None], pa.list_(pa.int64(), 2)), "categorical"),
            (pa.array([["a"], ["b"]], pa.list_(CODED)), "categorical"),
        ],
    )
    def test_are_dense_or_categorical_by_their_type(self, tmp_path, column, kind):
        table = {"user_id": [1, 2], "item_id": [1, 2], "split": pa.array([0, 0], pa.int8()), "feature": column}
        pq.write_table(pa.table(table), tmp_path / "a.parquet")
        interactions = Interactions.open(tmp_path, features=["feature"])
        (piece,) = interactions.scan(["feature"])
        if kind == "dense":
            assert interactions.dense_features == ("feature",)
            expected = [np.nan if each is None else float(each) for each in column.to_pylist()]
            np.testing.assert_array_equal(piece.numbers["feature"], np.array(expected))
        else:
            assert interactions.categorical_features == ("feature",)
            values, lengths_N = piece.values["feature"], piece.lengths["feature"]
            assert lengths_N.tolist() == [len(each or []) for each in column.to_pylist()]
            expected = [each for values in column.to_pylist() for each in values or []]
            assert values.distinct_D.take(values.codes_T).tolist() == expected

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (["agee"], r"features: got agee, which is not in .*a.parquet; it has: user_id, item_id, .*, age, day"),
            (["day"], r"day: got date32\[day\], want numbers, strings, or lists of strings or integers \(.*a.parquet"),
            (["floats"], r"floats: got list<.*double>, want numbers"),
            (["big"], r"big: got list<.*uint64>, want numbers"),
            (["nested"], r"nested: got list<.*list<"),
            (["age", "age"], "features: got age, twice; want other columns, each once"),
            (["user_id"], "features: got user_id, it is read anyway"),
            (["label"], "features: got label, it is the label"),
        ],
    )
    def test_are_refused(self, tmp_path, features, message):
        table = {"user_id": [1], "item_id": [1], "split": pa.array([0], pa.int8()), "label": [1.0], "age": [1]}
        table |= {"day": pa.array([1], pa.date32()), "floats": [[1.0]], "big": pa.array([[1]], pa.list_(pa.uint64()))}
        pq.write_table(pa.table({**table, "nested": [[["a"]]]}), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=message):
            Interactions.open(tmp_path, features=features)

    def test_must_be_alike_in_all_files(self, tmp_path):
        for name, zips in (("a", [1]), ("b", ["1"])):
            pq.write_table(pa.table({"user_id": [1], "item_id": [1], "zip": zips}), tmp_path / f"{name}.parquet")
        with pytest.raises(ConfigError, match=r"zip: got int64 in .*a.parquet, string in .*b.parquet; want the same"):
            Interactions.open(tmp_path, features=["zip"])

    def test_that_float32_cannot_hold_are_refused(self, tmp_path):
        pq.write_table(pa.table({"user_id": [1], "item_id": [1], "age": [1e300]}), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=r"age: got inf in .*a.parquet, want numbers that float32 can hold"):
            list(Interactions.open(tmp_path, features=["age"]).scan(["age"]))


class TestLabel:
    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0.0, None], "label: got 1 nulls within 2 rows"),
            ([0.0, float("nan")], "label: got 1 nulls within 2 rows"),
            ([1.0, 4.0], "label: got 4.0 in .*a.parquet, want 0 or 1"),
        ],
    )
    def test_must_be_0_or_1(self, tmp_path, labels, message):
        pq.write_table(pa.table({"user_id": [1, 2], "item_id": [1, 2], "label": labels}), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=message):
            list(Interactions.open(tmp_path, label=True).scan(["label"]))

    def test_must_be_there_and_a_number(self, tmp_path):
        pq.write_table(pa.table({"user_id": [1], "item_id": [1], "clicked": [1]}), tmp_path / "a.parquet")
        with pytest.raises(
            ConfigError, match=r"label: got no such column in .*a.parquet; it has: user_id, item_id, cl"
        ):
            Interactions.open(tmp_path, label=True)
        pq.write_table(pa.table({"user_id": [1], "item_id": [1], "label": ["yes"]}), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=r"label: got string, want a number"):
            Interactions.open(tmp_path, label=True)


@pytest.mark.parametrize(
    "column",
    [pa.array(["a", None]), pa.array([[1], []]), pa.array([1.5, None]), pa.array([True, None])],
    ids=lambda c: str(c.type),
)
def test_a_file_in_which_a_feature_is_null_throughout_has_the_type_of_the_others(tmp_path, column):
    for name, values in (("a", pa.nulls(2)), ("b", column), ("c", pa.array([[], []], pa.list_(pa.null())))):
        if name != "c" or pa.types.is_list(column.type):
            table = {"user_id": [1, 2], "item_id": [1, 2], "split": pa.array([0, 0], pa.int8()), "x": values}
            pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    interactions = Interactions.open(tmp_path, features=["x"])
    pieces = list(interactions.scan(["x"]))
    if interactions.dense_features:
        found = np.concatenate([piece.numbers["x"] for piece in pieces])
        np.testing.assert_array_equal(found, [np.nan, np.nan, column.to_pylist()[0], np.nan])
    else:
        assert [piece.lengths["x"].tolist() for piece in pieces] == [[0, 0], [1, 0], [0, 0]][: len(pieces)]
        assert len(build_vocabulary(interactions, "x")[1]) == 1
