"""Titles of ids, from Parquet, CSV and TSV."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpq_rec import (
    ConfigError,
    Int64Vocabulary,
    MissingDependencyError,
    StringVocabulary,
    open_artifact,
    write_artifact,
)
from dpq_rec.report.names import Names
from tests.dpq_rec.builders import dense_contents

IDS = [3, -1, 1 << 40]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """`user_id` and `item_id` of integers, and `tag` of strings."""
    vectors_VE = np.eye(3, dtype=np.float32)
    contents = {
        "user_id": dense_contents(vectors_VE),
        "item_id": dense_contents(vectors_VE, Int64Vocabulary.from_ids(IDS)),
        "tag": dense_contents(vectors_VE, StringVocabulary.from_ids(["a", "", "ü"])),
    }
    return open_artifact(write_artifact(tmp_path_factory.mktemp("names") / "artifact", contents)).tables


COLUMNS = {"item_id": [1 << 40, 3, 7, 3], "genre": ["x"] * 4, "title": ["Big, bigger", "Ü <b>", "other", "late"]}
TITLES = {3: "Ü <b>", 1 << 40: "Big, bigger"}


def write(path, columns):
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [columns, *zip(*columns.values(), strict=True)]
        quoted = [separator.join(f'"{cell}"' if "," in str(cell) else str(cell) for cell in line) for line in lines]
        path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv"])
def test_titles_are_those_of_the_ids_asked_for(tmp_path, tables, suffix):
    names = Names(write(tmp_path / f"items{suffix}", COLUMNS), tables)
    assert (names.table, names.id_column, names.title_column) == ("item_id", "item_id", "title")
    assert names.titles_of(IDS) == TITLES
    assert names.titles_of([]) == {}


@pytest.mark.parametrize(
    "name", ["s3:x.parquet", "file:x.csv", "~.parquet", "a%20b/ü #?.parquet", "X.PARQUET", "X.TSV"]
)
def test_a_path_is_a_path_whatever_it_looks_like(tmp_path, monkeypatch, tables, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(write(tmp_path / f"items{path.suffix.lower()}", COLUMNS))
    assert Names(Path(name), tables).titles_of(IDS) == TITLES


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_titles_of_string_ids(tmp_path, tables, suffix):
    names = Names(write(tmp_path / f"tags{suffix}", {"tag": ["ü", "", "b"], "name": ["U", "none", "B"]}), tables)
    assert names.titles_of(["a", "", "ü"]) == {"ü": "U", "": "none"}


def test_titles_that_are_missing_or_empty_are_none(tmp_path, tables):
    names = Names(write(tmp_path / "a.parquet", {"item_id": [3, -1, None], "title": [None, "", "x"]}), tables)
    assert names.titles_of(IDS) == {}


@pytest.mark.parametrize(
    "ids",
    [pa.array([3, 7], pa.int32()), pa.array([3, 7], pa.uint8()), pa.array(["3", "7"]), pa.array([3.0, 7.0])],
    ids=lambda ids: str(ids.type),
)
def test_parquet_ids_of_other_types_are_read_where_they_are_integers(tmp_path, tables, ids):
    titles = pa.array(["a", "b"]).dictionary_encode()
    assert Names(write(tmp_path / "a.parquet", {"item_id": ids, "title": titles}), tables).titles_of(IDS) == {3: "a"}


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        (["item_id", "Title", "name"], "Title"),
        (["item_id", "genre", "movie_name"], "movie_name"),
        (["item_id", "anything"], "anything"),
        (["genre", "title", "item_id"], "title"),
    ],
)
def test_the_column_of_titles_is_found(tmp_path, tables, columns, wanted):
    assert Names(write(tmp_path / "a.csv", {name: [] for name in columns}), tables).title_column == wanted


def test_a_column_of_numbers_is_not_taken_for_titles(tmp_path, tables):
    path = write(tmp_path / "a.parquet", {"item_id": [1], "name": [7], "anything": ["x"]})
    assert Names(path, tables).title_column == "anything"


def test_a_column_id_is_the_chosen_tables(tmp_path, tables):
    path = write(tmp_path / "a.csv", {"id": [1], "title": ["one"]})
    assert Names(path, tables, "user_id").table == "user_id"
    with pytest.raises(ConfigError, match=r"columns id, title, none of them named user_id, item_id, tag; .* --table"):
        Names(path, tables)


def test_a_feature_names_its_table(tmp_path):
    vectors_VE = np.eye(2, dtype=np.float32)
    contents = dense_contents(vectors_VE)
    contents = type(contents)(**{**vars(contents), "features": ("movie",)})
    tables = open_artifact(write_artifact(tmp_path / "a", {"t": contents})).tables
    assert Names(write(tmp_path / "a.csv", {"movie": [1], "title": ["one"]}), tables).titles_of([1]) == {1: "one"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.csv", None, "absent.csv is no file; name a .parquet, .csv, .tsv file"),
        ("items.dat", b"1::one", "got items.dat, want a .parquet, .csv, .tsv file"),
        ("items.parquet", b"PAR1 and no more", "items.parquet is no Parquet file that pyarrow can read"),
        ("items.csv", b"", r"columns \(none\)"),
        ("items.csv", b"movie,title\n1,one\n", "none of them named user_id, item_id, tag; rename its column of ids"),
        ("items.csv", b"item_id,genre,year\n", "none of them of titles; rename that one to title"),
        ("items.csv", b"item_id\n", "none of them of titles"),
        ("items.csv", b"item_id,title\n1,one\n2\n", "line 3: got 1 columns, the header has 2"),
        ("items.csv", b"item_id,title\n1,one\nx,two\n", "line 3: got 'x'.*64-bit integers, which table 'item_id' has"),
        ("items.csv", "item_id,title\n1,é\n".encode("latin-1"), "no csv in UTF-8"),
        ("items.csv", "item_id,title\n1,one\n".encode("utf-16"), "no csv in UTF-8"),
        ("items.csv", b"item_id,title,title\n1,one,two\n", "has 2 columns called title; rename or drop all but one"),
        ("items.csv", b'item_id,title\n1,"one\n', "no csv in UTF-8.*unexpected end of data"),
    ],
)
def test_a_file_that_has_no_titles_is_an_error_that_says_why(tmp_path, tables, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"--names: .*{message}"):
        Names(tmp_path / name, tables).titles_of(IDS)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path, tables, suffix):
    path = write(tmp_path / f"a{suffix}", {"item_id": [3], "title": ["three"]})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Names(path, tables).titles_of(IDS) == {3: "three"}


def test_two_parquet_columns_of_one_name_are_an_error(tmp_path, tables):
    arrays = [pa.array([3]), pa.array([4]), pa.array(["x"])]
    pq.write_table(pa.Table.from_arrays(arrays, ["item_id", "item_id", "title"]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"--names: .* has 2 columns called item_id; rename or drop all but one"):
        Names(tmp_path / "a.parquet", tables)


@pytest.mark.parametrize("ids", [["x"], [[1]], [1.5]], ids=str)
def test_parquet_ids_that_are_no_integers_are_an_error(tmp_path, tables, ids):
    names = Names(write(tmp_path / "a.parquet", {"item_id": ids, "title": ["a"]}), tables)
    with pytest.raises(
        ConfigError, match="column 'item_id' cannot be read as 64-bit integers, which table 'item_id' has"
    ):
        names.titles_of(IDS)


def test_parquet_without_pyarrow_says_how_to_install_it_and_csv_needs_none(tmp_path, tables, monkeypatch):
    parquet = write(tmp_path / "a.parquet", COLUMNS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'dpq-rec\[export\]'"):
        Names(parquet, tables)
    assert Names(write(tmp_path / "a.csv", COLUMNS), tables).titles_of(IDS) == TITLES
