"""Text as rows of words. In: text files, or Parquet files of documents with labels. Out: a Corpus, by split.

A text is one stream: every line is a sentence and ends in the word `<eos>`. Documents are bags of words, a word being a
run of letters and digits in lower case. A word's row is its rank by frequency in the training split. All is held in
memory, eight bytes a word.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import logging
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from dpq_rec.vocabulary import StringVocabulary
from training.data.files import no_nulls, open_files, refuse_twice, row_groups
from training.data.interactions import SplitCounts, checked_splits
from training.data.ragged import Bag

if TYPE_CHECKING:
    from training.recipes.text_classification import DocumentOptions

T = TypeVar("T")
Documents: TypeAlias = tuple[Bag, NDArray[np.int64]]  # the rows of their words, and their classes [B]
_logger = logging.getLogger(__name__)
END, UNKNOWN = "<eos>", "<unk>"
_NAMES = {"train": "train", "valid": "validation", "test": "test"}  # what begins a word of a file's name -> its split
_OPENERS: dict[str, Callable[..., IO[str]]] = {".txt": open, ".gz": gzip.open, ".xz": lzma.open}
_WORD = re.compile(r"\w+")
_HELD_OUT = 10  # of so many training documents the last is for validation, where nothing else is
_WANT_SPLIT = "a column split of 0 (train), 1 (validation) and 2 (test), or files with train and test in their names"


class Corpus(NamedTuple, Generic[T]):
    """A text, or documents with labels, by split; and their words.

    Attributes:
        splits: "train", "validation" and "test" -> of a text the row of each word, in reading order (int64 [T]); of B
            documents a bag of their words' rows, from which words without a row are absent, and their classes (int64
            [B]).
        words_V: the words of the training split by falling frequency, equal ones in the order of their letters: word v
            has row v.
        digest: SHA-256 of all of it.
        labels_C: the labels of the training split, ascending: class c is labels_C[c]. A text has none.
    """

    splits: Mapping[str, T]
    words_V: list[str]
    digest: str
    labels_C: Sequence[Any] = ()

    @property
    def vocabulary(self) -> StringVocabulary:
        """Word -> row."""
        return StringVocabulary.from_ids(self.words_V)


def _digest(words: str, arrays: Iterable[NDArray[np.int64]]) -> str:
    found = hashlib.sha256(words.encode())
    for array in arrays:
        found.update(np.append(array, -1).data)
    return found.hexdigest()


def _by_frequency(words: Iterable[str], min_count: int = 1) -> list[str]:
    """The distinct words by falling frequency, equal ones in the order of their letters."""
    counts = Counter(words)
    return sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))


def read_text(path: Path) -> Corpus[NDArray[np.int64]]:
    """Read all splits.

    A word that is not in the training split counts as `<unk>` where that is.

    Args:
        path: of the folder. The names of its files say which split they are of: a word of a name begins with train,
            valid or test. Several files of a split follow each other by name.

    Raises:
        ConfigError: a split without a file or without words, a file that cannot be read, a word that is not in the
            training split, which has no `<unk>`.
    """
    files = _files(path)
    words_V = _by_frequency(itertools.chain.from_iterable(_sentences(files["train"])))
    row_of = {word: row for row, word in enumerate(words_V)}
    splits = {split: _rows(of_split, row_of, split) for split, of_split in files.items()}
    return Corpus(splits, words_V, _digest("\n".join(words_V), splits.values()))


def split_of_name(name: str) -> str | None:
    """The split that a file's name says, where one of its words begins with train, valid or test.

    Raises:
        ConfigError: it says two.
    """
    found = {_NAMES[part] for part in re.findall(r"(?<![a-z])(train|valid|test)", name.lower())}
    if len(found) > 1:
        raise ConfigError(f"data: the name {name} says {' and '.join(sorted(found))}; want one split a file: rename it")
    return found.pop() if found else None


def _files(path: Path) -> dict[str, list[Path]]:
    """Split -> its files."""
    if not path.is_dir():
        raise ConfigError(f"data: {path} is no folder; want one with a text file for each of {', '.join(_NAMES)}")
    files: dict[str, list[Path]] = {split: [] for split in _NAMES.values()}
    for file in sorted(each for each in path.iterdir() if not each.name.startswith(".")):
        is_text = file.suffix.lower() in _OPENERS and not file.is_dir()
        split = split_of_name(file.name) if is_text else None
        if file.is_dir():
            _logger.warning("ignored %s: it is a folder; want the text files in %s itself", file, path)
        elif split is None:
            _logger.warning("ignored %s: it is no %s file of a split", file, ", ".join(_OPENERS))
        else:
            files[split].append(file)
    for name, split in _NAMES.items():
        if not files[split]:
            want = f"one whose name says {name} and ends in {', '.join(_OPENERS)}"
            raise ConfigError(f"data: {path} has no file for {split}; want {want}")
    return files


def _sentences(files: Sequence[Path]) -> Iterator[list[str]]:
    """The words of each line."""
    for file in files:
        wrong = f"data: {file} cannot be read as text"
        try:
            with _OPENERS[file.suffix.lower()](file, "rt", encoding="utf-8") as lines:
                for line in lines:
                    if "\0" in line:
                        raise ConfigError(f"{wrong}: it has NUL bytes, as UTF-16 has; want UTF-8")
                    # A byte order mark stands at the beginning, and where files were joined.
                    yield [*line.removeprefix("\ufeff").split(), END]
        except UnicodeDecodeError as error:
            raise ConfigError(f"{wrong}: {error}; want UTF-8") from error
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise ConfigError(f"{wrong}: {error}") from error


def _rows(files: Sequence[Path], row_of: Mapping[str, int], split: str) -> NDArray[np.int64]:
    """The row of each word.

    Raises:
        ConfigError: there are no words, or one without a row.
    """
    unknown = row_of.get(UNKNOWN, -1)
    rows_T = np.fromiter((row_of.get(word, unknown) for words in _sentences(files) for word in words), np.int64)
    if len(rows_T) < 2:
        raise ConfigError(f"data: got {len(rows_T)} words in the {split} text, want two or more")
    if (rows_T < 0).any():
        wrong = next(word for words in _sentences(files) for word in words if word not in row_of)
        want = f"words of the training text alone, or {UNKNOWN} among these to stand for others"
        raise ConfigError(f"data: the {split} text has the word {wrong!r}; want {want}")
    return rows_T


def read_documents(options: DocumentOptions) -> Corpus[Documents]:
    """Read all splits.

    A column `split` says the split of a row, as in interactions; else the name of the file, or of a folder that it lies
    in, a word of which begins with train, valid or test. Files of which neither does are ignored and named in the log.
    Without validation documents, every tenth training document is one.

    Raises:
        ConfigError: a file that cannot be read or lacks the text or the label, a null among them, a split without
            documents, labels that are all the same or were not seen in training, no word that occurs often enough.
    """
    documents = _read(options)
    if not documents["validation"]:
        every_tenth = slice(_HELD_OUT - 1, None, _HELD_OUT)
        documents["validation"] = documents["train"][every_tenth]
        del documents["train"][every_tenth]
    for split, of_split in documents.items():
        if not of_split:
            raise ConfigError(f"data: got no documents for {split} in {options.path}, want some: {_WANT_SPLIT}")
    labels_C = sorted({label for _, label in documents["train"]})
    if len(labels_C) < 2:
        raise ConfigError(f"{options.label}: got {labels_C[0]!r} in every training document, want two labels or more")
    words = (word for text, _ in documents["train"] for word in tokens(text))
    words_V = _by_frequency(words, options.min_count)[: options.max_words]
    if not words_V:
        raise ConfigError(f"--min-count: got {options.min_count}, and no word is in the training texts as often")
    row_of = {word: row for row, word in enumerate(words_V)}
    splits = {split: _labelled(of_split, row_of, labels_C, split) for split, of_split in documents.items()}
    arrays = [(bag.rows_T, bag.lengths, classes_B) for bag, classes_B in splits.values()]
    digest = _digest(repr((words_V, labels_C)), itertools.chain.from_iterable(arrays))
    return Corpus(splits, words_V, digest, labels_C)


def _read(options: DocumentOptions) -> dict[str, list[tuple[str, Any]]]:
    """Text and label of each document, by split."""
    documents: dict[str, list[tuple[str, Any]]] = {split: [] for split in SplitCounts._fields}
    path, names = Path(options.path), (options.text, options.label)
    for file in open_files(path):
        named, has_column = _split_of_path(file.path, path) or "", "split" in file.types
        if not (named or has_column):
            _logger.warning("ignored %s: it has no column split, and its name says none", file.path)
            continue
        refuse_twice([file], (*names, "split"))
        for name, want in zip(names, ("strings", "integers or strings"), strict=True):
            kind = file.type_of(name)
            is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not (is_string or (name == options.label and pa.types.is_integer(kind))):
                raise ConfigError(f"{name}: got {kind} in {file.path}, want {want}")
        columns = [*names, "split"] if has_column else names
        for batch in itertools.chain.from_iterable(group.read(columns) for group in row_groups([file])):
            texts, labels = (no_nulls(batch, name, file.path).to_pylist() for name in names)
            splits = [named] * len(texts)
            if has_column:
                splits = [SplitCounts._fields[split] for split in checked_splits(batch, file.path)]
            for split, text, label in zip(splits, texts, labels, strict=True):
                documents[split].append((text, label))
    return documents


def _split_of_path(file: Path, root: Path) -> str | None:
    """The split that a file's name says, or else that of the nearest folder up to the root, not the root's own."""
    folders = [folder for folder in file.relative_to(root).parts[:-1] if "=" not in folder]  # else a column
    names = [file.name, *reversed(folders)]
    return next((split for split in map(split_of_name, names) if split), None)


def tokens(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text.lower())


def _labelled(
    documents: Sequence[tuple[str, Any]], row_of: Mapping[str, int], labels_C: Sequence[Any], split: str
) -> Documents:
    class_of = {label: number for number, label in enumerate(labels_C)}
    unseen = next((label for _, label in documents if label not in class_of), None)
    if unseen is not None:
        raise ConfigError(f"label: got {unseen!r} in the {split} documents, which no training document has")
    rows = [[row_of[word] for word in tokens(text) if word in row_of] for text, _ in documents]
    rows_T = np.fromiter(itertools.chain.from_iterable(rows), np.int64)
    lengths_B = np.fromiter(map(len, rows), np.int64, len(rows))
    return Bag.of(rows_T, lengths_B), np.array([class_of[label] for _, label in documents], np.int64)
