"""Which files of a folder are read, and what their paths say: as Spark, Hive and Arrow write them."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from dpq_rec import ConfigError
from training.data import files
from training.data.interactions import TEST, TRAIN, VALIDATION, Interactions
from training.data.text import read_documents
from training.data.vocabularies import count_ids
from training.recipes.text_classification import DocumentOptions

NULL = "__HIVE_DEFAULT_PARTITION__"


def write(path, user=1, item=1, **more):
    """A file of one interaction."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"user_id": user, "item_id": item, **more}
    arrays = {
        name: column if isinstance(column, list | pa.Array | pa.ChunkedArray) else [column]
        for name, column in columns.items()
    }
    pq.write_table(pa.table({name: array for name, array in arrays.items() if array != [None]}), path)
    return path


def read(path, *features, label=False):
    """Rows in order: split and the values of all columns, by a scan."""
    interactions = Interactions.open(path, features=features, label=label)
    names = ["user_id", "item_id", *features, *(["label"] if label else [])]
    rows = []
    for piece in interactions.scan(names):
        columns = [piece.splits_N.tolist()]
        for name in names:
            if name in piece.numbers:
                columns.append(piece.numbers[name].tolist())
                continue
            values = piece.values[name]
            flat = iter(values.distinct_D.take(pa.array(values.codes_T)).to_pylist())
            columns.append([[next(flat) for _ in range(length)] for length in piece.lengths[name]])
        rows += zip(*columns, strict=True)
    return rows


def items_of(path):
    return [row[2][0] for row in read(path)]


class TestPartitions:
    def test_split_in_the_path_is_the_split(self, tmp_path):
        for split in (0, 1, 2):
            write(tmp_path / f"split={split}" / "part-0.parquet", item=split)
        interactions = Interactions.open(tmp_path)
        assert interactions.count_splits() == (1, 1, 1)
        assert interactions.read_ids(TEST)[1].distinct_D.to_pylist() == [2]
        assert count_ids(interactions, "item_id")[0].to_pylist() == [0]

    @pytest.mark.parametrize("users", [[1, 2, 10, -3], ["a", "b c/ä%=x", "", "7"]], ids=["integers", "strings"])
    def test_every_column_comes_back_as_pyarrow_reads_it(self, tmp_path, users, monkeypatch):
        monkeypatch.setattr(files, "_PIECE_ROWS", 2)
        rng, size = np.random.default_rng(0), 40
        columns = {
            "user_id": [users[i] for i in rng.integers(0, len(users), size)],
            "item_id": rng.integers(0, 5, size),
            "split": rng.integers(0, 3, size),
            "label": rng.integers(0, 2, size),
            "color": [["red", "blue", None][i] for i in rng.integers(0, 3, size)],
        }
        kinds = {"user_id": pa.array(users).type, "split": pa.int32(), "label": pa.int32(), "color": pa.string()}
        parts = ds.partitioning(pa.schema(list(kinds.items())), flavor="hive")
        ds.write_dataset(pa.table(columns), tmp_path / "data", format="parquet", partitioning=parts)
        found = read(tmp_path / "data", "color", label=True)
        rows = ds.dataset(tmp_path / "data", partitioning=parts).to_table(columns=list(columns)).to_pylist()
        wanted = [
            (r["split"], [r["user_id"]], [r["item_id"]], [r["color"]] if r["color"] is not None else [], r["label"])
            for r in rows
        ]
        assert sorted(found, key=str) == sorted(wanted, key=str)

    @pytest.mark.parametrize(
        ("values", "want"),
        [
            (["0", "007"], [0.0, 7.0]),
            (["0.5", "2"], [0.5, 2.0]),
            (["true", "False"], [1.0, 0.0]),
            (["1", NULL], [1.0, None]),
            (["2024-01-01", "2024-01-02"], [["2024-01-01"], ["2024-01-02"]]),
            (["1e", "x"], [["1e"], ["x"]]),
            (["18446744073709551615", "1"], [["18446744073709551615"], ["1"]]),
            (["a%20b%2Fc", "caf%C3%A9"], [["a b/c"], ["café"]]),
            (["", "x"], [[""], ["x"]]),
        ],
        ids=str,
    )
    def test_values_have_the_type_that_all_of_them_read_as(self, tmp_path, values, want):
        for number, value in enumerate(values):
            write(tmp_path / f"{number}" / f"x={value}" / "a.parquet", split=[TRAIN])
        found = [row[3] for row in read(tmp_path, "x")]
        assert [None if each != each else each for each in found] == want

    def test_a_column_of_nulls_alone_is_left_out_as_one_in_a_file_is(self, tmp_path, caplog):
        write(tmp_path / f"x={NULL}" / "a.parquet", split=[TRAIN])
        assert Interactions.open(tmp_path, features=["x"]).dense_features == ()
        assert "x has no values in any file; it is left out" in caplog.text

    @pytest.mark.parametrize("name", ["user_id", "label", "split"])
    def test_a_null_where_none_may_be_is_refused(self, tmp_path, name):
        lacking = {"user": None} if name == "user_id" else {}
        write(tmp_path / f"{name}={NULL}" / "a.parquet", **lacking)
        write(tmp_path / f"{name}=1" / "a.parquet", **lacking)
        with pytest.raises(ConfigError, match=f"{name}: got 1 nulls"):
            read(tmp_path, label=name == "label")

    @pytest.mark.parametrize(
        "texts", [["5", "3", "4"], ["2024-05-01 00%3A00%3A00", "2024-03-01", "2024-04-01"]], ids=str
    )
    def test_timestamps_in_paths_order_rows(self, tmp_path, texts):
        for item, text in enumerate(texts):
            write(tmp_path / f"{item}" / f"timestamp={text}" / "a.parquet", item=item)
        assert [row[0] for row in read(tmp_path)] == [TEST, TRAIN, VALIDATION]

    def test_names_are_decoded_and_may_begin_with_an_underscore(self, tmp_path):
        write(tmp_path / "_day=1" / "the%20hour=2" / "a.parquet", split=[TRAIN])
        assert read(tmp_path, "_day", "the hour") == [(TRAIN, [1], [1], 1.0, 2.0)]

    def test_a_folder_above_the_one_that_is_named_is_no_column(self, tmp_path):
        write(tmp_path / "split=2" / "data" / "a.parquet", split=[TRAIN])
        assert [row[0] for row in read(tmp_path / "split=2" / "data")] == [TRAIN]
        assert [row[0] for row in read(tmp_path / "split=2" / "data" / "a.parquet")] == [TRAIN]

    @pytest.mark.parametrize(
        ("stored", "text"),
        [
            (pa.array([1], pa.int8()), "1"),
            (pa.array([1], pa.int8()), "1.0"),
            (pa.array([0.1], pa.float32()), "0.1"),
            (pa.array(["007"]), "007"),
            (pa.array(["a/b"]).dictionary_encode(), "a%2Fb"),
            (pa.array([True]), "true"),
            (pa.array([None], pa.int8()), NULL),
        ],
    )
    def test_a_column_in_the_file_too_is_the_files_where_both_agree(self, tmp_path, stored, text):
        write(tmp_path / f"x={text}" / "a.parquet", split=[TRAIN], x=stored)
        assert len(read(tmp_path, "x")) == 1

    @pytest.mark.parametrize(
        ("stored", "text"),
        [
            (pa.array([1], pa.int8()), "0"),
            (pa.array([1], pa.int8()), "1.5"),
            (pa.array([1], pa.int8()), "one"),
            (pa.array(["7"]), "007"),
            (pa.array([None], pa.int8()), "1"),
            (pa.array([1], pa.int8()), NULL),
            (pa.array([["a"]]), "a"),
        ],
    )
    def test_a_contradiction_of_file_and_path_is_refused(self, tmp_path, stored, text):
        write(tmp_path / f"x={text}" / "a.parquet", split=[TRAIN], x=stored)
        with pytest.raises(ConfigError, match=rf"x: got .* in .*a\.parquet, whose path says x={text}; want the same"):
            read(tmp_path, "x")

    def test_a_split_that_file_and_path_say_differently_is_refused(self, tmp_path):
        write(tmp_path / "split=0" / "a.parquet", split=[TEST])
        with pytest.raises(ConfigError, match=r"split: got 2 in .*, whose path says split=0"):
            read(tmp_path)

    def test_two_values_in_one_path_are_refused(self, tmp_path):
        write(tmp_path / "x=1" / "x=2" / "a.parquet")
        with pytest.raises(ConfigError, match="x: got 1 and 2 in x=1/x=2; want one value"):
            read(tmp_path)

    def test_a_folder_that_is_partitioned_in_part_is_refused(self, tmp_path):
        write(tmp_path / "split=0" / "a.parquet")
        write(tmp_path / "b.parquet")
        with pytest.raises(ConfigError, match=r"split: got none in .*b\.parquet, int64 in .*a\.parquet; want the same"):
            read(tmp_path)

    def test_documents_take_split_and_label_from_paths(self, tmp_path):
        for split in (TRAIN, VALIDATION, TEST):
            for label in ("art", "pets"):
                path = tmp_path / f"split={split}" / f"label={label}" / "part-0.parquet"
                path.parent.mkdir(parents=True)
                pq.write_table(pa.table({"text": [f"{label} {split}", "cat"]}), path)
        documents = read_documents(DocumentOptions(path=str(tmp_path), min_count=1))
        assert documents.labels_C == ["art", "pets"]
        assert documents.splits["test"][1].tolist() == [0, 0, 1, 1]
        assert documents.words_V == ["0", "cat", "art", "pets"]


class TestFiles:
    def test_sparks_names_are_read_in_the_order_of_paths(self, tmp_path):
        names = ["a.parquet/part-00000-6f.snappy.parquet", "a.parquet/part-00001-6f", "a.parquet/part-00002.c000"]
        names += ["b.parq", "c.pq", "d.PARQUET", "e/000000_0"]
        for item, name in reversed(list(enumerate(names))):
            write(tmp_path / name, item=item)
        for name in ("_SUCCESS", "_committed_17", ".part-00000-6f.snappy.parquet.crc", "a.parquet/_SUCCESS"):
            (tmp_path / name).write_bytes(b"")
        assert items_of(tmp_path) == list(range(7))

    def test_a_single_file_may_have_any_name(self, tmp_path):
        for name in ("part-0", "x=1", "data.bin", "_a", "s3:x"):
            assert items_of(write(tmp_path / name, item=3)) == [3]

    def test_the_log_says_what_is_read_and_what_is_not(self, tmp_path, caplog):
        write(tmp_path / "a.parquet")
        write(tmp_path / "sub" / "part-0")
        for name in ("b.csv", "c.json.gz", "sub/d.orc", "README"):
            (tmp_path / name).write_text("user_id,item_id\n1,2\n")
        with caplog.at_level(logging.INFO, "training.data.files"):
            items_of(tmp_path)
        read_line, other_line = (record.getMessage() for record in caplog.records)
        assert read_line.endswith("reading 2 Parquet file(s): a.parquet, sub/part-0")
        assert "not reading 4 file(s) that are no Parquet by name" in other_line
        assert other_line.endswith("README, b.csv, c.json.gz, sub/d.orc")

    def test_the_log_counts_many_files_and_names_a_few(self, tmp_path, caplog):
        write(tmp_path / "a.parquet")
        for number in range(30):
            (tmp_path / f"{number:02}.csv").touch()
        items_of(tmp_path)
        assert "30 file(s) that are no Parquet by name (30 .csv): 00.csv, 01.csv" in caplog.text
        assert "19.csv and 10 more" in caplog.text

    def test_hidden_names_that_may_hold_data_are_said(self, tmp_path, caplog):
        for name in ("a.parquet", "_b.parquet", "_metadata", "_temporary/c.parquet"):
            write(tmp_path / name)
        (tmp_path / "_SUCCESS").touch()
        assert len(items_of(tmp_path)) == 1
        (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
        assert warning.getMessage().endswith("not reading names that begin with . or _: _b.parquet, _temporary")

    def test_a_table_whose_log_is_not_read_is_said(self, tmp_path, caplog):
        write(tmp_path / "a.parquet")
        write(tmp_path / "_delta_log" / "0.checkpoint.parquet")
        assert len(items_of(tmp_path)) == 1
        assert "rows that it has deleted may be among those read" in caplog.text

    def test_integers_of_any_width_are_alike(self, tmp_path):
        for number, kind in enumerate((pa.int8(), pa.int64(), pa.int32())):
            columns = {name: pa.array([number], kind) for name in ("user", "item", "split")}
            write(tmp_path / f"{number}.parquet", **columns)
        write(tmp_path / "split=2" / "a.parquet", item=3)
        assert read(tmp_path) == [(0, [0], [0]), (1, [1], [1]), (2, [2], [2]), (2, [1], [3])]

    def test_nothing_to_read_is_an_error(self, tmp_path):
        (tmp_path / "a.csv").write_text("user_id,item_id\n")
        with pytest.raises(ConfigError, match=r"no Parquet file at .* has both user_id and item_id; found: none"):
            items_of(tmp_path)

    def test_links_are_followed_and_what_they_lead_to_is_read_once(self, tmp_path, caplog):
        write(tmp_path / "elsewhere" / "x.parquet", item=1)
        write(tmp_path / "data" / "a.parquet", item=2)
        (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "data" / "back").symlink_to(tmp_path / "data")
        (tmp_path / "data" / "latest.parquet").symlink_to(tmp_path / "data" / "a.parquet")
        assert items_of(tmp_path / "data") == [2, 1]
        assert "not reading twice what links lead to: latest.parquet" in caplog.text

    def test_a_link_to_nothing_is_named(self, tmp_path):
        (tmp_path / "a.parquet").symlink_to(tmp_path / "gone")
        with pytest.raises(ConfigError, match=r"a\.parquet cannot be read"):
            items_of(tmp_path)

    @pytest.mark.parametrize("name", ["run:1", "s3:", "file:", "a%20b", "with space", "größe", "~", "~root", "#?&"])
    def test_a_path_is_a_path_whatever_it_looks_like(self, tmp_path, name, monkeypatch):
        write(tmp_path / name / f"{name}.parquet", item=5)
        monkeypatch.chdir(tmp_path)
        assert items_of(name) == [5]
        assert items_of(f"{name}/{name}.parquet") == [5]

    @pytest.mark.parametrize(
        "columns", [{"user_id": pa.nulls(0)}, {"user_id": pa.array([], pa.string()), "x": pa.nulls(0)}]
    )
    def test_files_without_rows_may_have_other_columns(self, tmp_path, columns):
        write(tmp_path / "b.parquet", split=[TRAIN], x=["a"])
        pq.write_table(pa.table({**columns, "item_id": pa.array([], pa.int64())}), tmp_path / "a.parquet")
        assert read(tmp_path, "x") == [(TRAIN, [1], [1], ["a"])]

    def test_columns_that_no_one_asked_for_may_differ(self, tmp_path):
        write(tmp_path / "a.parquet", item=1, x=["a"])
        write(tmp_path / "b.parquet", item=2, y=[1])
        assert items_of(tmp_path) == [1, 2]

    @pytest.mark.parametrize("name", ["user_id", "item_id", "split", "timestamp", "age"])
    def test_two_columns_of_one_name_are_refused(self, tmp_path, name):
        names = ["user_id", "item_id", "split", "timestamp", "age", name]
        pq.write_table(pa.Table.from_arrays([pa.array([0])] * 6, names), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=rf"{name}: got 2 columns of that name in .*a\.parquet; want one"):
            read(tmp_path, "age")

    def test_names_that_differ_in_letters_and_those_that_are_not_read_may_stand_twice(self, tmp_path):
        names = ["user_id", "item_id", "split", "Split", "USER_ID", "x", "x", "label", "label"]
        pq.write_table(pa.Table.from_arrays([pa.array([0])] * 9, names), tmp_path / "a.parquet")
        assert read(tmp_path) == [(TRAIN, [0], [0])]

    def test_two_texts_of_one_name_are_refused(self, tmp_path):
        table = pa.Table.from_arrays([pa.array(["a"])] * 3, ["text", "text", "label"])
        pq.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(ConfigError, match="text: got 2 columns of that name"):
            read_documents(DocumentOptions(path=str(tmp_path), min_count=1))

    def test_documents_take_their_split_from_the_folder_that_spark_wrote(self, tmp_path):
        for split in ("train", "valid", "test"):
            folder = tmp_path / f"{split}.parquet"
            folder.mkdir()
            pq.write_table(pa.table({"text": [split, "cat"], "label": [0, 1]}), folder / "part-00000-6f.parquet")
        documents = read_documents(DocumentOptions(path=str(tmp_path), min_count=1))
        assert documents.words_V == ["cat", "train"]
        assert [len(classes_N) for _, classes_N in documents.splits.values()] == [2, 2, 2]
