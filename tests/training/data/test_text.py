import gzip
import lzma
import os
from pathlib import Path

import numpy as np
import pytest

from dpq_rec import ConfigError
from training.data.text import read_text, split_of_name

DATA = Path(os.environ.get("TEST_DATA_DIR", Path(__file__).parents[4] / "shared" / "data"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.train.txt").write_text("the cat saw the dog\n the <unk> \n")
    with gzip.open(tmp_path / "a.valid.gz", "wt") as file:
        file.write("dog the\n")
    with lzma.open(tmp_path / "a.test.txt.xz", "wt") as file:
        file.write("a cat\n\nsaw")
    return tmp_path


def words(text, split):
    return [text.words_V[row] for row in text.splits[split]]


def test_read_text_reads_plain_and_compressed_files_and_ends_every_line(folder):
    text = read_text(folder)
    assert words(text, "train") == ["the", "cat", "saw", "the", "dog", "<eos>", "the", "<unk>", "<eos>"]
    assert words(text, "validation") == ["dog", "the", "<eos>"]


def test_words_have_rows_by_falling_frequency_then_in_the_order_of_letters(folder):
    assert read_text(folder).words_V == ["the", "<eos>", "<unk>", "cat", "dog", "saw"]


def test_a_word_unseen_in_training_counts_as_unk_and_an_empty_line_is_a_sentence(folder):
    assert words(read_text(folder), "test") == ["<unk>", "cat", "<eos>", "<eos>", "saw", "<eos>"]


def test_a_word_unseen_in_training_is_named_where_nothing_stands_for_it(folder):
    (folder / "a.train.txt").write_text("the cat saw the dog\n")
    with pytest.raises(ConfigError, match="the test text has the word 'a'; want words of the training text alone"):
        read_text(folder)


def test_vocabulary_finds_rows_by_word(folder):
    text = read_text(folder)
    assert text.vocabulary.rows(["saw", "the", "none"]).tolist() == [5, 0, -1]


def test_files_of_a_split_follow_each_other_by_name(folder):
    (folder / "b.train.txt").write_text("dog\n")
    assert words(read_text(folder), "train")[-3:] == ["<eos>", "dog", "<eos>"]


def test_other_files_are_ignored_and_named(folder, caplog):
    for name in ("README.txt", "train.zip", ".train.txt"):
        (folder / name).write_text("x\n")
    assert "x" not in read_text(folder).words_V
    assert [record.args[0].name for record in caplog.records] == ["README.txt", "train.zip"]


def test_digest_tells_texts_apart(folder):
    before = read_text(folder).digest
    assert before == read_text(folder).digest
    (folder / "a.train.txt").write_text("the cat saw the <unk>\n the dog \n")  # the same words in another order
    assert read_text(folder).words_V == ["the", "<eos>", "<unk>", "cat", "dog", "saw"]
    assert read_text(folder).digest != before


def test_read_text_refuses_a_split_without_a_file_or_without_words(folder):
    (folder / "a.valid.gz").rename(folder / "held-out.gz")
    with pytest.raises(ConfigError, match=r"no file for validation; want one whose name says valid and ends in \.txt"):
        read_text(folder)
    (folder / "valid.txt").touch()
    with pytest.raises(ConfigError, match="got 0 words in the validation text, want two or more"):
        read_text(folder)


def test_read_text_refuses_what_is_no_folder(folder):
    with pytest.raises(ConfigError, match=r"a\.train\.txt is no folder; want one with a text file for each of train"):
        read_text(folder / "a.train.txt")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.test.txt.xz", b"no xz"),
        ("a.valid.gz", b"no gzip"),
        ("a.train.txt", b"\xff\xfe"),
        ("a.valid.gz", gzip.compress(b"dog the\n", mtime=0)[:-9]),
    ],
)
def test_read_text_names_a_file_that_it_cannot_read(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} cannot be read as text: "):
        read_text(folder)


@pytest.mark.parametrize(("name", "pack"), [("a.train.txt", bytes), ("a.train.gz", gzip.compress)])
def test_a_byte_order_mark_is_no_part_of_a_word(folder, name, pack):
    (folder / "a.train.txt").unlink()
    (folder / name).write_bytes(pack("\ufeffthe cat\n\ufeffthe dog saw <unk>\n".encode()))  # two files, joined
    assert words(read_text(folder), "train") == ["the", "cat", "<eos>", "the", "dog", "saw", "<unk>", "<eos>"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_text_that_is_not_utf_8_is_refused_and_says_so(folder, encoding):
    (folder / "a.valid.gz").write_bytes(gzip.compress("the dög\n".encode(encoding)))
    with pytest.raises(ConfigError, match=r"a\.valid\.gz cannot be read as text: .*; want UTF-8"):
        read_text(folder)


def test_folders_are_ignored_and_named_and_suffixes_may_be_in_capitals(folder, caplog):
    (folder / "a.train.txt").rename(folder / "A.TRAIN.TXT")
    (folder / "train.txt").mkdir()
    assert read_text(folder).words_V[0] == "the"
    assert "train.txt: it is a folder; want the text files in" in caplog.text


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("ptb.train.txt.xz", "train"),
        ("Validation-000.parquet", "validation"),
        ("wiki_test.txt", "test"),
        ("train_subset.parquet", "train"),
        ("contest.txt", None),
        ("strain.txt", None),
    ],
)
def test_split_of_name_looks_at_the_beginnings_of_words(name, split):
    assert split_of_name(name) == split


def test_split_of_name_refuses_two():
    with pytest.raises(ConfigError, match=r"the name train-test\.txt says test and train"):
        split_of_name("train-test.txt")


def test_ptb_has_the_published_sizes():
    if not (DATA / "ptb").exists():
        pytest.skip(f"no {DATA / 'ptb'}: set TEST_DATA_DIR")
    text = read_text(DATA / "ptb")
    assert {split: len(rows_T) for split, rows_T in text.splits.items()} == {
        "train": 929_589,
        "validation": 73_760,
        "test": 82_430,
    }
    assert len(text.words_V) == 10_000
    assert (np.diff(np.bincount(text.splits["train"])) <= 0).all()
