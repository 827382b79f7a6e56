"""A generated population with planted structure. In: SyntheticConfig. Out: Parquet files of interactions.

Items belong to clusters. Each user likes two, and takes most of its items from the first, some from the second, the
rest from anywhere; within a cluster and over all, popularity falls with rank as Zipf's law has it. How many items
users take follows a power law too. Every user trains, and so does every item where there are interactions enough.

A click's log odds add up what four causes give: whether the item is of a cluster that the user likes, the price of the
moment, the user's segment and the item's tags. So each feature is worth something, and so are the two ids.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dpq_rec.errors import ConfigError
from dpq_rec.files import naming
from training.data.interactions import TEST, TRAIN, VALIDATION
from training.data.ragged import ranges

_FORMAT = 1  # of what is generated: another number where the same settings give other rows
_DESCRIPTION = "_synthetic.json"  # readers of Parquet folders skip names that start so
_FIRST_TASTE, _SECOND_TASTE = 0.6, 0.25  # of a user's items; the rest comes from all items
_FLAT_RANKS = 5  # Zipf-Mandelbrot: popularity is 1 / (rank + 5)
_PARETO_SHAPE, _MAX_ACTIVITY = 1.5, 200.0
_REDRAWS = 3
_BLOCK_ROWS = 1 << 20
_GROUP_ROWS = 1 << 17  # small row groups, so that a shuffle window holds users from all over
_ID_BITS = 48  # JSON numbers and doubles hold ids exactly
_LIKED, _OTHER = 1.0, -1.0
_PRICE_EFFECT = -1.0  # of a standard deviation
_MEAN_PRICE, _PRICE_STD = 20.0, 5.0
_SEGMENTS = ("bargain", "family", "gadget", "luxury", "student")
_SEGMENT_EFFECTS = np.linspace(-1, 1, len(_SEGMENTS))
_TAGS = tuple(f"tag-{number}" for number in range(12))
_TAG_EFFECTS = np.linspace(-1, 1, len(_TAGS))
_MOST_TAGS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What to generate.

    Attributes:
        num_users: users, every one in the training split.
        num_items: items; every one is in the training split where num_interactions exceeds users, items and held-out
            rows together, otherwise the most popular ones that fit.
        num_interactions: rows of all splits.
        num_held_out_users: users with a validation and a test item, evenly drawn; all where there are fewer users.
        seed: 0 or more.
        with_clicks: columns label, price (dense), segment (string) and tags (list of strings) too.
        string_ids: ids are strings, of the same users and items.
    """

    num_users: int
    num_items: int
    num_interactions: int
    num_held_out_users: int = 20_000
    seed: int = 0
    with_clicks: bool = False
    string_ids: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_users", 1), ("num_items", 3), ("num_held_out_users", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: got {getattr(self, name)}, want at least {least}")
        if self.num_interactions < self.num_users + self.num_held_out_rows:
            want = f"at least {self.num_users + self.num_held_out_rows}"
            parts = f"one for each of {self.num_users} users and {self.num_held_out_rows} held out"
            raise ConfigError(f"num_interactions: got {self.num_interactions}, want {want}: {parts}")

    @property
    def num_held_out_rows(self) -> int:
        """Rows of the validation and test splits, at most."""
        return 2 * min(self.num_held_out_users, self.num_users)

    @property
    def num_covered_items(self) -> int:
        """Items that are taken at least once."""
        return min(self.num_items, self.num_interactions - self.num_held_out_rows - self.num_users)

    @property
    def num_clusters(self) -> int:
        """Clusters of items, of sqrt(num_items) * 2 or so items each."""
        return max(1, min(self.num_users, round(self.num_items**0.5 / 2)))

    @property
    def num_coverers(self) -> int:
        """Users who together take every item once: a multiple of the clusters."""
        return self.num_users // self.num_clusters * self.num_clusters


def generate(config: SyntheticConfig, folder: str | os.PathLike[str]) -> Path:
    """Write the population to part-00000.parquet, ... in a folder, or find that it is there already.

    The same settings give the same rows. Memory grows with the users (32 bytes each), not with the interactions.
    The folder appears at once when all is written.

    Raises:
        ConfigError: the folder holds something else.
    """
    folder = Path(folder)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if value is not False}
    description = json.dumps({"format": _FORMAT, **settings})
    if folder.exists():
        found = folder / _DESCRIPTION
        if not found.is_file() or found.read_text() != description:
            raise ConfigError(f"{folder}: got another population or other files, want {description}; name a new folder")
        return folder
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        with naming(folder):
            _write(config, unfinished)
            (unfinished / _DESCRIPTION).write_text(description)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    unfinished.rename(folder)
    return folder


def _write(config: SyntheticConfig, folder: Path) -> None:
    options = {"use_dictionary": ["user_id", "split"], "compression": "zstd", "row_group_size": _GROUP_ROWS}
    num_rows_U, is_held_out_U = _draw_activity(config)
    blocks_U = (np.cumsum(num_rows_U) - 1) // _BLOCK_ROWS  # of a million rows or so
    starts = np.flatnonzero(np.diff(blocks_U, prepend=-1))
    for number, (start, stop) in enumerate(itertools.pairwise([*starts, config.num_users])):
        users_N = np.repeat(np.arange(start, stop), num_rows_U[start:stop])
        items_N, splits_N = _draw_block(config, users_N, num_rows_U[start:stop], is_held_out_U, number)
        columns = _columns(config, users_N, items_N, splits_N, number)
        with (folder / f"part-{number:05}.parquet").open("wb") as file:  # a path, pyarrow may take for a URI
            pq.write_table(pa.table(columns), file, **options)


def _draw_activity(config: SyntheticConfig) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """How many rows each user has of all splits [U] (int64), and whether items of it are held out [U].

    Training rows are Pareto-distributed and add up to what is asked; users to hold out are drawn evenly.
    """
    rng = np.random.default_rng([config.seed, 0])
    num_users = config.num_users
    is_held_out_U = np.zeros(num_users, np.bool_)
    is_held_out_U[rng.choice(num_users, config.num_held_out_rows // 2, replace=False)] = True
    num_train = config.num_interactions - config.num_held_out_rows
    least_U = np.maximum(_num_covering(config, np.arange(num_users)), 1)
    weights_U = np.minimum(rng.random(num_users) ** (-1 / _PARETO_SHAPE), _MAX_ACTIVITY)
    share_U = np.cumsum(weights_U)
    up_to_U = (share_U / share_U[-1] * (num_train - least_U.sum())).astype(np.int64)
    return least_U + np.diff(up_to_U, prepend=0) + 2 * is_held_out_U, is_held_out_U


def _draw_block(
    config: SyntheticConfig,
    users_N: NDArray[np.int64],
    num_rows_B: NDArray[np.int64],
    is_held_out_U: NDArray[np.bool_],
    number: int,
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Numbers of items, and splits, of some users' rows: each one's training rows, validation, then test."""
    rng = np.random.default_rng([config.seed, 1, number])
    place_N = ranges(0, num_rows_B)
    drawn_N = np.flatnonzero(place_N >= _num_covering(config, users_N))
    items_N = users_N % config.num_coverers + place_N * config.num_coverers
    items_N[drawn_N] = _draw_items(config, users_N[drawn_N], rng)
    for _ in range(_REDRAWS):
        again_N = _repeats(users_N, items_N)
        items_N[again_N] = _draw_items(config, users_N[again_N], rng)
    left_N = np.repeat(num_rows_B, num_rows_B) - place_N
    splits_N = np.where(left_N == 1, TEST, np.where(left_N == 2, VALIDATION, TRAIN)).astype(np.int8)
    splits_N[~is_held_out_U[users_N]] = TRAIN
    # What the user has already can only be missed: it trains, and where it was to be held out, nothing is.
    again_N = _repeats(users_N, items_N)
    splits_N[np.isin(users_N, users_N[again_N[splits_N[again_N] != TRAIN]])] = TRAIN
    return items_N, splits_N


def _columns(
    config: SyntheticConfig,
    users_N: NDArray[np.int64],
    items_N: NDArray[np.int64],
    splits_N: NDArray[np.int8],
    number: int,
) -> dict[str, Any]:
    """The columns of a file, by their names in it."""
    user_ids_N, item_ids_N = _scatter(users_N, 2 * config.seed), _scatter(items_N, 2 * config.seed + 1)
    columns: dict[str, Any] = {"user_id": user_ids_N, "item_id": item_ids_N, "split": splits_N}
    if config.string_ids:
        columns |= {"user_id": _strings(user_ids_N, "user"), "item_id": _strings(item_ids_N, "item")}
    if config.with_clicks:
        clusters_N = items_N % config.num_clusters
        liked_N = (clusters_N == users_N % config.num_clusters) | (clusters_N == _second_tastes(config, users_N))
        rng = np.random.default_rng([config.seed, 2, number])
        columns |= _draw_clicks(user_ids_N, item_ids_N, liked_N, rng)
    return columns


def _draw_clicks(
    user_hashes_N: NDArray[np.int64],
    item_hashes_N: NDArray[np.int64],
    liked_N: NDArray[np.bool_],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """A click or none for each row, and what it came from: label, price, segment and tags (Arrow).

    Args:
        user_hashes_N: random numbers below 2^48, of each row's user.
        item_hashes_N: of its item.
        liked_N: whether the item is of a cluster that the user likes.
        rng: draws prices and clicks.
    """
    prices_N = rng.normal(size=len(liked_N))
    segments_N = user_hashes_N % len(_SEGMENTS)
    num_tags_N = item_hashes_N % (_MOST_TAGS + 1)
    tags_NT = (item_hashes_N[:, None] // (7, 211, 5_003)) % len(_TAGS)
    has_tag_NT = np.arange(_MOST_TAGS) < num_tags_N[:, None]
    log_odds_N = np.where(liked_N, _LIKED, _OTHER) + _PRICE_EFFECT * prices_N + _SEGMENT_EFFECTS[segments_N]
    log_odds_N += (_TAG_EFFECTS[tags_NT] * has_tag_NT).sum(1)
    labels_N = rng.random(len(liked_N)) < 1 / (1 + np.exp(-log_odds_N))
    offsets = np.append(0, np.cumsum(num_tags_N)).astype(np.int32)
    return {
        "label": pa.array(labels_N.astype(np.float32)),
        "price": pa.array((_MEAN_PRICE + _PRICE_STD * prices_N).astype(np.float32)),
        "segment": pa.array(_SEGMENTS).take(pa.array(segments_N)),
        "tags": pa.ListArray.from_arrays(offsets, pa.array(_TAGS).take(pa.array(tags_NT[has_tag_NT]))),
    }


def _strings(ids_N: NDArray[np.int64], prefix: str) -> Any:
    """Names of ids, each distinct one made once."""
    encoded = pa.array(ids_N).dictionary_encode()
    names = pa.array([f"{prefix}-{each:012x}" for each in encoded.dictionary.to_pylist()], pa.string())
    return names.take(encoded.indices)


def _second_tastes(config: SyntheticConfig, users_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """The second cluster that each user likes; the first is its number mod the clusters."""
    return _mix(users_N.astype(np.uint64) + np.uint64(1)).astype(np.int64) % config.num_clusters


def _num_covering(config: SyntheticConfig, users_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many items users take so that every item is taken.

    Coverer u of U takes items u, u + U, ..., which are of its first cluster.
    """
    coverers = config.num_coverers
    most_N = (config.num_covered_items - users_N + coverers - 1) // coverers
    return np.where(users_N < coverers, np.maximum(most_N, 0), 0)


def _draw_items(config: SyntheticConfig, users_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """An item for each row. Item i is of cluster i % C, where it has popularity rank i // C."""
    clusters = config.num_clusters
    source_N = rng.random(len(users_N))
    tastes_N = np.where(source_N < _FIRST_TASTE, users_N % clusters, _second_tastes(config, users_N))
    anywhere_N = source_N >= _FIRST_TASTE + _SECOND_TASTE
    sizes_N = np.where(anywhere_N, config.num_items, (config.num_items - 1 - tastes_N) // clusters + 1)
    ranks_N = _zipf_ranks(sizes_N, rng)
    return np.where(anywhere_N, ranks_N, tastes_N + clusters * ranks_N)


def _zipf_ranks(sizes_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Ranks below sizes_N with probability about 1 / (rank + 5), by inverting the continuous distribution."""
    ranks_N = _FLAT_RANKS * (np.exp(np.log1p(sizes_N / _FLAT_RANKS) * rng.random(len(sizes_N))) - 1)
    return np.minimum(ranks_N.astype(np.int64), sizes_N - 1)


def _repeats(users_N: NDArray[np.int64], items_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where a row repeats an earlier pair. Users come in order."""
    order_N = np.argsort((users_N - users_N[:1]) * (items_N.max(initial=0) + 1) + items_N, kind="stable")
    same_N = (users_N[order_N[1:]] == users_N[order_N[:-1]]) & (items_N[order_N[1:]] == items_N[order_N[:-1]])
    return order_N[1:][same_N]


def _scatter(numbers_N: NDArray[np.int64], salt: int) -> NDArray[np.int64]:
    """Distinct numbers below 2^48 to distinct ids below 2^48 that look random."""
    salted_N = numbers_N.astype(np.uint64) ^ (_mix(np.array([salt + 1], np.uint64)))
    return _mix(salted_N).astype(np.int64)


def _mix(numbers_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of the numbers below 2^48: each step, a multiplication by an odd number or a xor-shift, is one."""
    mask = np.uint64((1 << _ID_BITS) - 1)
    mixed_N = numbers_N & mask
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        mixed_N = mixed_N ^ (mixed_N >> np.uint64(_ID_BITS // 2))
        mixed_N = (mixed_N * np.uint64(factor)) & mask
    return mixed_N ^ (mixed_N >> np.uint64(_ID_BITS // 2))
