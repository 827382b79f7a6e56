"""Interactions to batches of rows. In: Interactions and vocabularies. Out: Batch(bags, dense_BF, labels_B).

Ids and values become rows as soon as they are read; what is held is a window of rows, never the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from dpq_rec.kernels import MISSING_ROW
from dpq_rec.vocabulary import Vocabulary
from training.data.columns import Values
from training.data.files import IDS, RowGroup
from training.data.interactions import Interactions, Piece
from training.data.splits import TRAIN
from training.data.stretches import places
from training.data.vocabularies import find_rows

_WINDOW_ROWS = 1 << 22  # rows mixed with each other: their ids take 128 MB


class Bag(NamedTuple):
    """The values of B examples of one column, example after example.

    Attributes:
        rows_T: row of each value (int64).
        lengths_B: values of each example (int64): ones for ids and single strings, 0 where there is none.
    """

    rows_T: NDArray[np.int64]
    lengths_B: NDArray[np.int64]

    def take(self, order_N: NDArray[Any]) -> Bag:
        """Those of some examples, in the order given."""
        lengths_N = self.lengths_B[order_N]
        if len(self.rows_T) == len(self.lengths_B) and (self.lengths_B == 1).all():
            return Bag(self.rows_T[order_N], lengths_N)
        firsts_N = (np.cumsum(self.lengths_B) - self.lengths_B)[order_N]
        return Bag(self.rows_T[places(firsts_N, lengths_N)], lengths_N)


class Batch(NamedTuple):
    """B examples.

    Attributes:
        bags: user_id, item_id and the categorical features, by column.
        dense_BF: numbers of the F dense features (float64), in the order asked for; a missing number is 0.
        labels_B: 0 or 1 (float32); None where the data were not asked for labels.
    """

    bags: dict[str, Bag]
    dense_BF: NDArray[np.float64]
    labels_B: NDArray[np.float32] | None

    @property
    def num_examples(self) -> int:
        """B."""
        return len(self.dense_BF)

    def take(self, order_N: NDArray[Any]) -> Batch:
        """Some examples, in the order given."""
        bags = {name: bag.take(order_N) for name, bag in self.bags.items()}
        return Batch(bags, self.dense_BF[order_N], None if self.labels_B is None else self.labels_B[order_N])

    def split(self, batch_size: int) -> Iterator[Batch]:
        """The examples in batches, the last one shorter."""
        ends = {name: np.append(0, np.cumsum(bag.lengths_B)) for name, bag in self.bags.items()}
        for at in range(0, self.num_examples, batch_size):
            here = slice(at, min(at + batch_size, self.num_examples))
            bags = {
                name: Bag(bag.rows_T[ends[name][here.start] : ends[name][here.stop]], bag.lengths_B[here])
                for name, bag in self.bags.items()
            }
            yield Batch(bags, self.dense_BF[here], None if self.labels_B is None else self.labels_B[here])

    @classmethod
    def join(cls, parts: Sequence[Batch]) -> Batch:
        """All parts, one after the other; at least one."""
        parts = [part for part in parts if part.num_examples] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        bags = {
            name: Bag(*map(np.concatenate, zip(*(part.bags[name] for part in parts), strict=True)))
            for name in parts[0].bags
        }
        labels = [part.labels_B for part in parts if part.labels_B is not None]
        dense_BF = np.concatenate([part.dense_BF for part in parts])
        return cls(bags, dense_BF, np.concatenate(labels) if labels else None)


def train_batches(
    interactions: Interactions,
    vocabularies: Mapping[str, Vocabulary],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    window_rows: int = _WINDOW_ROWS,
) -> Iterator[Batch]:
    """This rank's batches of an epoch: over all ranks every training row once, but for the remainder.

    All ranks get equally many batches, all of batch_size: fewer than world_size * batch_size rows, others in each
    epoch, are dropped at its end. The order depends on data, seed and epoch alone: row groups are read in shuffled
    order, and rows are mixed within windows of several row groups. Data that fit into a window are mixed completely.

    Args:
        interactions: the data.
        vocabularies: of user_id, item_id and each categorical feature, built from these data.
        batch_size: B, of one rank.
        rank: of world_size ranks; takes every world_size-th batch.
        world_size: number of ranks.
        seed: 0 or more, the same on all ranks.
        epoch: 0 or more.
        shuffle: False gives the rows in file order, and drops the last ones.
        window_rows: rows held at a time, fewer where they have several values of a feature each; a row takes 50 bytes
            or so for each column.

    Raises:
        ConfigError: too few rows for one batch on each rank, or a value that its vocabulary does not know.
    """
    rng = np.random.default_rng([seed, epoch])
    groups = list(interactions.row_groups)
    if shuffle:
        groups = [groups[i] for i in rng.permutation(len(groups))]
    rest, step_rows, num_rows = _no_examples(interactions), batch_size * world_size, 0
    for window in _windows(_examples(interactions, vocabularies, TRAIN, groups), window_rows):
        num_rows += window.num_examples
        window = Batch.join([rest, window])
        order_N = np.arange(window.num_examples, dtype=np.int32)
        if shuffle:
            rng.shuffle(order_N)
        whole = len(order_N) // step_rows * step_rows
        mine = window.take(order_N[:whole].reshape(-1, world_size, batch_size)[:, rank].ravel())
        rest = window.take(order_N[whole:])
        del window, order_N
        yield from mine.split(batch_size)
    if num_rows < step_rows:
        got = f"{batch_size} on each of {world_size} rank(s), {num_rows} training rows"
        raise ConfigError(f"batch_size: got {got}; want at most {num_rows // world_size}")


def eval_batches(
    interactions: Interactions,
    vocabularies: Mapping[str, Vocabulary],
    split: int,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This rank's batches of a split, in row order: over all ranks every row once.

    All ranks get equally many batches, so that a collective may run for each. The last ones are shorter, and empty
    where fewer rows are left than ranks. A value that its vocabulary does not know, of an id too, is absent from its
    bag.

    Args:
        interactions: the data.
        vocabularies: of user_id, item_id and each categorical feature.
        split: TRAIN, VALIDATION or TEST.
        batch_size: B, of one rank.
        rank: of world_size ranks.
        world_size: number of ranks.
    """
    rest, step_rows = _no_examples(interactions), batch_size * world_size
    for window in _windows(_examples(interactions, vocabularies, split), step_rows):
        window = Batch.join([rest, window])
        order_N = np.arange(window.num_examples)
        whole = len(order_N) // step_rows * step_rows
        mine_N = order_N[:whole].reshape(-1, world_size, batch_size)[:, rank].ravel()
        rest = window.take(order_N[whole:])
        yield from window.take(mine_N).split(batch_size)
    if rest.num_examples:
        yield rest.take(np.array_split(np.arange(rest.num_examples), world_size)[rank])


def _examples(
    interactions: Interactions,
    vocabularies: Mapping[str, Vocabulary],
    split: int,
    groups: Iterable[RowGroup] | None = None,
) -> Iterator[Batch]:
    """The rows of a split as they are read, a piece at a time."""
    label = ["label"] if interactions.has_label else []
    columns = [*IDS, *interactions.categorical_features, *interactions.dense_features, *label]
    for piece in interactions.scan(columns, groups):
        yield _encode(piece.where(piece.splits_N == split), vocabularies, interactions.dense_features, split)


def _encode(piece: Piece, vocabularies: Mapping[str, Vocabulary], dense_features: Sequence[str], split: int) -> Batch:
    bags = {}
    for name, values in piece.values.items():
        rows_T = find_rows(vocabularies[name], values)
        if split == TRAIN:
            _refuse_unknown(rows_T, values, name)
        bags[name] = _known(rows_T, piece.lengths[name])
    dense = [np.nan_to_num(piece.numbers[name], nan=0) for name in dense_features]
    dense_BF = np.stack(dense, 1) if dense else np.empty((len(piece.splits_N), 0))
    label_N = piece.numbers.get("label")
    return Batch(bags, dense_BF, None if label_N is None else label_N.astype(np.float32))


def _no_examples(interactions: Interactions) -> Batch:
    empty = np.empty(0, np.int64)
    bags = {name: Bag(empty, empty) for name in (*IDS, *interactions.categorical_features)}
    no_numbers = np.empty((0, len(interactions.dense_features)))
    return Batch(bags, no_numbers, np.empty(0, np.float32) if interactions.has_label else None)


def _windows(examples: Iterable[Batch], window_rows: int) -> Iterator[Batch]:
    """Examples in stretches of at least window_rows, or of as many values of a column; the last one shorter."""
    parts: list[Batch] = []
    size = 0
    for part in examples:
        parts.append(part)
        size += max(part.num_examples, *(len(bag.rows_T) for bag in part.bags.values()))
        if size >= window_rows:
            parts, size = [Batch.join(parts)], 0
            del part
            yield parts.pop()
    if parts:
        yield Batch.join(parts)


def _known(rows_T: NDArray[np.int64], lengths_B: NDArray[np.int64]) -> Bag:
    """A bag without values that have no row."""
    known_T = rows_T != MISSING_ROW
    if known_T.all():
        return Bag(rows_T, lengths_B)
    examples_T = np.repeat(np.arange(len(lengths_B)), lengths_B)
    return Bag(rows_T[known_T], np.bincount(examples_T[known_T], minlength=len(lengths_B)).astype(np.int64))


def _refuse_unknown(rows_T: NDArray[np.int64], values: Values, column: str) -> None:
    unknown_T = rows_T == MISSING_ROW
    if unknown_T.any():
        one = values.where(unknown_T).distinct_D[0]
        got = f"{np.count_nonzero(unknown_T)} values of training rows that are not in the vocabulary, {one} for one"
        raise ConfigError(f"{column}: got {got}; want the vocabulary that was built from these data")
