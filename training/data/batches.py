"""Interactions to batches of rows. In: Interactions and vocabularies. Out: Batch(bags, dense_BF, labels_B).

Ids and values become rows as soon as they are read; what is held is a window of rows, never the data.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from dpq_rec.kernels import MISSING_ROW
from dpq_rec.vocabulary import Vocabulary
from training.data.files import RowGroup
from training.data.interactions import IDS, TRAIN, Interactions, Piece
from training.data.ragged import Bag

_WINDOW_ROWS = 1 << 22  # rows mixed with each other: their ids take 128 MB


class Batch(NamedTuple):
    """B examples.

    Attributes:
        bags: user_id, item_id and the categorical features, by column.
        dense_BF: numbers of the F dense features (float64), in the order requested; a missing number is 0.
        labels_B: 0 or 1 (float32); None where no labels were requested.
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
        for start in range(0, self.num_examples, batch_size):
            stop = min(start + batch_size, self.num_examples)
            bags = {name: bag.slice(start, stop) for name, bag in self.bags.items()}
            labels_B = None if self.labels_B is None else self.labels_B[start:stop]
            yield Batch(bags, self.dense_BF[start:stop], labels_B)

    @classmethod
    def join(cls, parts: Sequence[Batch]) -> Batch:
        """All parts, one after the other; at least one."""
        parts = [part for part in parts if part.num_examples] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        bags = {name: Bag.join([part.bags[name] for part in parts]) for name in parts[0].bags}
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
    windows = _windows(interactions, vocabularies, TRAIN, window_rows, groups)
    num_rows, _ = yield from _whole_batches(windows, batch_size, rank, world_size, rng if shuffle else None)
    if num_rows < batch_size * world_size:
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
    windows = _windows(interactions, vocabularies, split, batch_size * world_size)
    _, rest = yield from _whole_batches(windows, batch_size, rank, world_size)
    if rest is not None and rest.num_examples:
        yield rest.take(np.array_split(np.arange(rest.num_examples), world_size)[rank])


def _whole_batches(
    windows: Iterable[Batch], batch_size: int, rank: int, world_size: int, rng: np.random.Generator | None = None
) -> Generator[Batch, None, tuple[int, Batch | None]]:
    """Every world_size-th batch, shuffled within windows; returns how many examples there were, and those left over."""
    step_rows, num_rows, rest = batch_size * world_size, 0, None
    for window in windows:
        num_rows += window.num_examples
        window = window if rest is None else Batch.join([rest, window])
        order_N = np.arange(window.num_examples, dtype=np.int32)
        if rng is not None:
            rng.shuffle(order_N)
        whole = len(order_N) // step_rows * step_rows
        mine = window.take(order_N[:whole].reshape(-1, world_size, batch_size)[:, rank].ravel())
        rest = window.take(order_N[whole:])
        del window, order_N
        yield from mine.split(batch_size)
    return num_rows, rest


def _windows(
    interactions: Interactions,
    vocabularies: Mapping[str, Vocabulary],
    split: int,
    window_rows: int,
    groups: Iterable[RowGroup] | None = None,
) -> Iterator[Batch]:
    """The rows of a split in windows of at least window_rows, or of as many values of a column; the last one shorter.

    A value of a training row that its vocabulary does not know is an error.
    """
    label = ["label"] if interactions.has_label else []
    columns = [*IDS, *interactions.categorical_features, *interactions.dense_features, *label]
    parts: list[Batch] = []
    size = 0
    for piece in interactions.scan(columns, groups, splits=(split,)):
        parts.append(_encode(piece, vocabularies, interactions.dense_features, must_know=split == TRAIN))
        size += max(len(piece.splits_N), *(len(bag.rows_T) for bag in parts[-1].bags.values()))
        if size >= window_rows:
            parts, size = [Batch.join(parts)], 0
            yield parts.pop()
    if parts:
        yield Batch.join(parts)


def _encode(
    piece: Piece, vocabularies: Mapping[str, Vocabulary], dense_features: Sequence[str], *, must_know: bool
) -> Batch:
    """The rows of a piece; values without a row are left out of their bags.

    Raises:
        ConfigError: there are such values, and must_know.
    """
    bags = {}
    for name, values in piece.values.items():
        rows_T = values.rows(vocabularies[name])
        unknown_T = rows_T == MISSING_ROW
        if must_know and unknown_T.any():
            one = values.where(unknown_T).distinct_D[0]
            got = f"{np.count_nonzero(unknown_T)} values of training rows that are not in the vocabulary, {one} for one"
            raise ConfigError(f"{name}: got {got}; want the vocabulary that was built from these data")
        bag = Bag.of(rows_T, piece.lengths[name])
        bags[name] = bag.keep(~unknown_T) if unknown_T.any() else bag
    dense = [np.nan_to_num(piece.numbers[name], nan=0) for name in dense_features]
    dense_BF = np.stack(dense, 1) if dense else np.empty((len(piece.splits_N), 0))
    label_N = piece.numbers.get("label")
    return Batch(bags, dense_BF, None if label_N is None else label_N.astype(np.float32))
