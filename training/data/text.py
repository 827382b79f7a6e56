"""Text as rows of words. In: a folder of text files. Out: Text(rows of each split, the training split's vocabulary).

Every line is a sentence and ends in the word `<eos>`. The text is held in memory, eight bytes a word.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import logging
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from dpq_rec.vocabulary import StringVocabulary

_logger = logging.getLogger(__name__)
END, UNKNOWN = "<eos>", "<unk>"
_SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # what begins a word of a file's name -> its split
_OPENERS: dict[str, Callable[..., IO[str]]] = {".txt": open, ".gz": gzip.open, ".xz": lzma.open}


class Text(NamedTuple):
    """A text and its words.

    Attributes:
        rows: "train", "validation" and "test" -> the row of each word, in reading order (int64 [T]).
        words_V: the words of the training split by falling frequency, equal ones in the order of their letters: word v
            has row v.
    """

    rows: Mapping[str, NDArray[np.int64]]
    words_V: list[str]

    @property
    def vocabulary(self) -> StringVocabulary:
        """Word -> row."""
        return StringVocabulary.from_ids(self.words_V)

    def digest(self) -> str:
        """SHA-256 of words and rows."""
        found = hashlib.sha256("\n".join(self.words_V).encode())
        for rows_T in self.rows.values():
            found.update(np.append(rows_T, -1).data)
        return found.hexdigest()


def read_text(path: Path) -> Text:
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
    counts = Counter(itertools.chain.from_iterable(_sentences(files["train"])))
    words_V = [word for word, _ in sorted(counts.items(), key=lambda each: (-each[1], each[0]))]
    row_of = {word: row for row, word in enumerate(words_V)}
    return Text({split: _rows(of_split, row_of, split) for split, of_split in files.items()}, words_V)


def split_of_name(name: str) -> str | None:
    """The split that a file's name says, where one of its words begins with train, valid or test.

    Raises:
        ConfigError: it says two.
    """
    found = {_SPLITS[part] for part in re.findall(r"(?<![a-z])(train|valid|test)", name.lower())}
    if len(found) > 1:
        raise ConfigError(f"data: the name {name} says {' and '.join(sorted(found))}; want one split a file: rename it")
    return found.pop() if found else None


def _files(path: Path) -> dict[str, list[Path]]:
    """Split -> its files."""
    if not path.is_dir():
        raise ConfigError(f"data: {path} is no folder; want one with a text file for each of {', '.join(_SPLITS)}")
    files: dict[str, list[Path]] = {split: [] for split in _SPLITS.values()}
    for file in sorted(each for each in path.iterdir() if not each.name.startswith(".")):
        is_text = file.suffix.lower() in _OPENERS and not file.is_dir()
        split = split_of_name(file.name) if is_text else None
        if file.is_dir():
            _logger.warning("ignored %s: it is a folder; want the text files in %s itself", file, path)
        elif split is None:
            _logger.warning("ignored %s: it is no %s file of a split", file, ", ".join(_OPENERS))
        else:
            files[split].append(file)
    for name, split in _SPLITS.items():
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
