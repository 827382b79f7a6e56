import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpq_rec import ConfigError
from training.data.text import read_documents, tokens
from training.recipes.text_classification import DocumentOptions

DATA = Path(os.environ.get("TEST_DATA_DIR", Path(__file__).parents[4] / "shared" / "data"))


def write(path, texts, labels, **more):
    pq.write_table(pa.table({"text": texts, "label": labels, **more}), path)


def read(path, **options):
    return read_documents(DocumentOptions(path=str(path), **{"min_count": 1, **options}))


def bags(documents, split):
    """The words of each document."""
    rows_T, offsets = documents.splits[split][0]
    return [[documents.words_V[row] for row in part] for part in np.split(rows_T, offsets[1:-1])]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.parquet", ["The cat, the dog!", "a DOG's cat the"], ["pets", "art"])
    write(tmp_path / "valid.parquet", ["a cat"], ["art"])
    write(tmp_path / "test.parquet", ["one dog", "none here"], ["pets", "pets"])
    return tmp_path


def test_tokens_are_lower_case_runs_of_letters_and_digits():
    assert tokens("The U.S. paid $2.5bn (Grün) _x") == ["the", "u", "s", "paid", "2", "5bn", "grün", "_x"]
    assert tokens(" -- ") == []


def test_read_documents_takes_splits_from_the_files_names(folder):
    documents = read(folder)
    assert bags(documents, "train") == [["the", "cat", "the", "dog"], ["a", "dog", "s", "cat", "the"]]
    assert bags(documents, "validation") == [["a", "cat"]]
    assert [documents.labels_C[c] for c in documents.splits["train"][1]] == ["pets", "art"]
    assert documents.labels_C == ["art", "pets"]


def test_words_without_a_row_are_absent(folder):
    assert bags(read(folder), "test") == [["dog"], []]


def test_words_have_rows_by_falling_frequency_then_in_the_order_of_letters(folder):
    assert read(folder).words_V == ["the", "cat", "dog", "a", "s"]
    assert read(folder, min_count=2).words_V == ["the", "cat", "dog"]
    assert read(folder, max_words=2).words_V == ["the", "cat"]
    assert read(folder).vocabulary.rows(["dog", "here"]).tolist() == [2, -1]


def test_a_column_names_the_split_whatever_the_file_is_called(tmp_path):
    splits = pa.array([2, 0, 1, 0], pa.int8())
    write(tmp_path / "train.parquet", ["x", "y", "z", "w"], [1, 0, 0, 1], split=splits)
    documents = read(tmp_path / "train.parquet")
    assert bags(documents, "train") == [["y"], ["w"]]
    assert documents.splits["test"][1].tolist() == [1]


def test_every_tenth_training_document_is_for_validation_where_nothing_else_is(folder):
    (folder / "valid.parquet").unlink()
    write(folder / "train.parquet", [f"w{i}" for i in range(25)], [i % 2 for i in range(25)])
    write(folder / "test.parquet", ["x"], [0])
    documents = read(folder)
    assert bags(documents, "train") == [[f"w{i}"] for i in range(25) if i not in (9, 19)]
    assert bags(documents, "validation") == [[], []]  # their words are not in the training split
    assert documents.splits["validation"][1].tolist() == [1, 1]


def test_other_files_are_ignored_and_named(folder, caplog):
    write(folder / "more.parquet", ["x"], ["pets"])
    assert "x" not in read(folder).words_V
    assert "more.parquet: it has no column split" in caplog.text


def test_columns_may_have_other_names(folder):
    for name in ("train", "valid", "test"):
        table = pq.read_table(folder / f"{name}.parquet").rename_columns(["body", "topic"])
        pq.write_table(table, folder / f"{name}.parquet")
    assert read(folder, text="body", label="topic").labels_C == ["art", "pets"]


def test_digest_tells_documents_apart(folder):
    before = read(folder).digest
    assert read(folder).digest == before
    write(folder / "train.parquet", ["The cat, the dog!", "a DOG's cat the"], ["art", "pets"])
    assert read(folder).digest != before
    write(folder / "train.parquet", ["The cat, the dog! a", "DOG's cat the"], ["pets", "art"])
    assert read(folder).digest != before


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["a"]}, {}, r"label: got no such column in .*train\.parquet; it has: text"),
        ({"label": [1]}, {}, "text: got no such column in"),
        ({"text": [1], "label": [1]}, {}, "text: got int64 in .*, want strings"),
        ({"text": ["a"], "label": [0.5]}, {}, "label: got double in .*, want integers or strings"),
        ({"text": ["a", None], "label": [1, 0]}, {}, "text: got 1 nulls"),
        ({"text": ["a", "b"], "label": ["x", "x"]}, {}, "label: got 'x' in every training document, want two"),
        ({"text": ["a", "b"], "label": ["x", "art"]}, {}, "label: got 'pets' in the test documents, which no training"),
        ({"text": ["a", "b"], "label": ["pets", "art"]}, {"min_count": 2}, "--min-count: got 2, and no word"),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}, {}, "got no documents for train"),
    ],
)
def test_read_documents_says_what_is_wrong(folder, columns, options, message):
    pq.write_table(pa.table(columns), folder / "train.parquet")
    with pytest.raises(ConfigError, match=message):
        read(folder, **options)


def test_read_documents_refuses_a_missing_test_split_and_a_file_that_is_no_parquet(folder):
    (folder / "test.parquet").unlink()
    with pytest.raises(ConfigError, match=r"got no documents for test in .*, want some: a column split of 0"):
        read(folder)
    (folder / "test.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match=r"test\.parquet cannot be read as Parquet"):
        read(folder)


def test_ag_news_has_four_topics_and_its_test_whole():
    if not (DATA / "ag_news").exists():
        pytest.skip(f"no {DATA / 'ag_news'}: set TEST_DATA_DIR")
    documents = read(DATA / "ag_news")
    sizes = {split: len(classes_B) for split, (_, classes_B) in documents.splits.items()}
    assert sizes == {"train": 17_284 - 1728, "validation": 1728, "test": 7600}
    assert documents.labels_C == [0, 1, 2, 3]
    assert documents.words_V[0] == "the"
