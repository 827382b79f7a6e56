"""Clicks with planted causes. In: which user meets which item. Out: columns label, price, segment and tags.

A click's log odds add up what four causes give: whether the item is of a cluster that the user likes, the price of the
moment, the user's segment and the item's tags. So each feature is worth something, and so are the two ids.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_LIKED, _OTHER = 1.0, -1.0
_PRICE_EFFECT = -1.0  # of a standard deviation
_MEAN_PRICE, _PRICE_STD = 20.0, 5.0
_SEGMENTS = ("bargain", "family", "gadget", "luxury", "student")
_SEGMENT_EFFECTS = np.linspace(-1, 1, len(_SEGMENTS))
_TAGS = tuple(f"tag-{number}" for number in range(12))
_TAG_EFFECTS = np.linspace(-1, 1, len(_TAGS))
_MOST_TAGS = 3


class Clicks(NamedTuple):
    """Columns of a file (Arrow), by their names in it."""

    label: pa.Array
    price: pa.Array
    segment: pa.Array
    tags: pa.Array


def draw_clicks(
    user_hashes_N: NDArray[np.int64],
    item_hashes_N: NDArray[np.int64],
    liked_N: NDArray[np.bool_],
    rng: np.random.Generator,
) -> Clicks:
    """A click or none for each row, and what it came from.

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
    return Clicks(
        pa.array(labels_N.astype(np.float32)),
        pa.array((_MEAN_PRICE + _PRICE_STD * prices_N).astype(np.float32)),
        pa.array(_SEGMENTS).take(pa.array(segments_N)),
        pa.ListArray.from_arrays(offsets, pa.array(_TAGS).take(pa.array(tags_NT[has_tag_NT]))),
    )
