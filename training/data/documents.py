"""Documents with labels. In: Parquet files with a text and a label. Out: Documents(bags of words, labels, by split).

A word is a run of letters and digits, in lower case. All documents are held in memory, eight bytes a word.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from dpq_rec.vocabulary import StringVocabulary
from training.data.batches import Bag
from training.data.files import DataFile, no_nulls, open_files, refuse_twice, row_groups
from training.data.splits import TEST, TRAIN, VALIDATION, checked_splits
from training.data.text import split_of_name

if TYPE_CHECKING:
    from training.recipes.text_classification import DocumentOptions

_logger = logging.getLogger(__name__)
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
_HELD_OUT = 10  # of so many training documents the last is for validation, where nothing else is
_WORD = re.compile(r"\w+")


class Labelled(NamedTuple):
    """B documents: the rows of their words, and their classes [B] (int64)."""

    bag: Bag
    classes_B: NDArray[np.int64]

    def take(self, order_N: NDArray[Any]) -> Labelled:
        """Some documents, in the order given."""
        return Labelled(self.bag.take(order_N), self.classes_B[order_N])

    def thinned(self, kept_T: NDArray[np.bool_]) -> Labelled:
        """The same documents with some of their words."""
        documents_T = np.repeat(np.arange(len(self.classes_B)), self.bag.lengths_B)
        lengths_B = np.bincount(documents_T[kept_T], minlength=len(self.classes_B))
        return Labelled(Bag(self.bag.rows_T[kept_T], lengths_B), self.classes_B)


class Documents(NamedTuple):
    """The documents of each split.

    Attributes:
        splits: "train", "validation" and "test" -> the documents; a word that has no row is absent from its bag.
        words_V: words of the training split by falling frequency, equal ones in the order of their letters: word v has
            row v.
        labels_C: the labels of the training split, ascending: class c is labels_C[c].
    """

    splits: Mapping[str, Labelled]
    words_V: list[str]
    labels_C: list[Any]

    @property
    def vocabulary(self) -> StringVocabulary:
        """Word -> row."""
        return StringVocabulary.from_ids(self.words_V)

    def digest(self) -> str:
        """SHA-256 of words, documents and labels."""
        found = hashlib.sha256(repr((self.words_V, self.labels_C)).encode())
        for (rows_T, lengths_B), classes_B in self.splits.values():
            for each in (rows_T, lengths_B, classes_B):
                found.update(np.append(each, -1).data)
        return found.hexdigest()


class _Column(NamedTuple):
    """Texts and labels of a split as they are read."""

    texts: list[str]
    labels: list[Any]


def read_documents(options: DocumentOptions) -> Documents:
    """Read all splits.

    A column `split` says the split of a row, as in interactions; else the name of the file, or of a folder that it lies
    in, a word of which begins with train, valid or test. Files of which neither does are ignored and named in the log.
    Without validation documents, every tenth training document is one.

    Raises:
        ConfigError: a file that cannot be read or lacks the text or the label, a null among them, a split without
            documents, labels that are all the same or were not seen in training, no word that occurs often enough.
    """
    columns = _read(options)
    if not columns["validation"].texts:
        train = columns["train"]
        held_out = slice(_HELD_OUT - 1, None, _HELD_OUT)
        columns["validation"] = _Column(train.texts[held_out], train.labels[held_out])
        columns["train"] = _Column(*([x for i, x in enumerate(each, 1) if i % _HELD_OUT] for each in train))
    for split, (texts, _) in columns.items():
        if not texts:
            raise ConfigError(f"data: got no documents for {split} in {options.path}, want some: {_WANT_SPLIT}")
    labels_C = sorted(set(columns["train"].labels))
    if len(labels_C) < 2:
        raise ConfigError(f"{options.label}: got {labels_C[0]!r} in every training document, want two labels or more")
    words_V = _words(columns["train"].texts, options)
    row_of = {word: row for row, word in enumerate(words_V)}
    splits = {split: _labelled(column, row_of, labels_C, split) for split, column in columns.items()}
    return Documents(splits, words_V, labels_C)


_WANT_SPLIT = "a column split of 0 (train), 1 (validation) and 2 (test), or files with train and test in their names"


def _read(options: DocumentOptions) -> dict[str, _Column]:
    """Texts and labels of each split."""
    columns = {split: _Column([], []) for split in SPLITS}
    path = Path(options.path)
    for file in open_files(path):
        named = _split_of_path(file.path, path)
        if "split" not in file.types and named is None:
            _logger.warning("ignored %s: it has no column split, and its name says none", file.path)
            continue
        refuse_twice([file], (options.text, options.label, "split"))
        _check_types(file, options)
        for split, texts, labels in _pieces(file, options, named):
            columns[split].texts.extend(texts)
            columns[split].labels.extend(labels)
    return columns


def _split_of_path(file: Path, root: Path) -> str | None:
    """The split that a file's name says, or else that of the nearest folder up to the root, not the root's own."""
    folders = [folder for folder in file.relative_to(root).parts[:-1] if "=" not in folder]  # else a column
    names = [file.name, *reversed(folders)]
    return next((split for split in map(split_of_name, names) if split), None)


def _pieces(file: DataFile, options: DocumentOptions, named: str | None) -> Iterator[tuple[str, list[str], list[Any]]]:
    """Split, texts and labels of documents that follow each other."""
    for group in row_groups([file]):
        for batch in group.read([options.text, options.label, *(["split"] if "split" in file.types else [])]):
            texts, labels = (no_nulls(batch, name, file.path) for name in (options.text, options.label))
            if "split" not in file.types:
                assert named is not None, "such a file is ignored"
                yield named, texts.to_pylist(), labels.to_pylist()
                continue
            splits_N = checked_splits(batch, file.path)
            for split, number in SPLITS.items():
                mask = pa.array(splits_N == number)
                yield split, texts.filter(mask).to_pylist(), labels.filter(mask).to_pylist()


def _check_types(file: DataFile, options: DocumentOptions) -> None:
    """Raises ConfigError for a column that is missing or of a wrong type."""
    fits = {options.text: _is_string, options.label: lambda kind: _is_string(kind) or pa.types.is_integer(kind)}
    for name, fit in fits.items():
        if name not in file.types:
            raise ConfigError(f"{name}: got no such column in {file.path}; it has: {', '.join(file.types)}")
        if not fit(file.types[name]):
            want = "strings" if name == options.text else "integers or strings"
            raise ConfigError(f"{name}: got {file.types[name]} in {file.path}, want {want}")


def _is_string(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def tokens(text: str) -> list[str]:
    """The words of a text."""
    return _WORD.findall(text.lower())


def _words(texts: Sequence[str], options: DocumentOptions) -> list[str]:
    counts = Counter(itertools.chain.from_iterable(map(tokens, texts)))
    frequent = [(-count, word) for word, count in counts.items() if count >= options.min_count]
    if not frequent:
        raise ConfigError(f"--min-count: got {options.min_count}, and no word is in the training texts as often")
    return [word for _, word in sorted(frequent)[: options.max_words]]


def _labelled(column: _Column, row_of: Mapping[str, int], labels_C: Sequence[Any], split: str) -> Labelled:
    class_of = {label: number for number, label in enumerate(labels_C)}
    unseen = next((label for label in column.labels if label not in class_of), None)
    if unseen is not None:
        raise ConfigError(f"label: got {unseen!r} in the {split} documents, which no training document has")
    rows = [[row_of[word] for word in tokens(text) if word in row_of] for text in column.texts]
    lengths_B = np.fromiter(map(len, rows), np.int64, len(rows))
    rows_T = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(lengths_B.sum()))
    classes_B = np.fromiter(map(class_of.__getitem__, column.labels), np.int64, len(rows))
    return Labelled(Bag(rows_T, lengths_B), classes_B)
