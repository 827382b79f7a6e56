"""Retrieval metrics over all items (contract 2). In: users, their held-out items, vectors. Out: each user's metrics.

The order of a user's candidates is never made: it is enough to count, for each test item, the candidates that score at
least as high. Scores exist for a tile of users and items at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from dpq_rec.kernels import MISSING_ROW
from dpq_rec.vocabulary import Vocabulary
from training.data.columns import ARROW_TYPES, Values
from training.data.histories import user_item_pairs
from training.data.interactions import TEST, TRAIN, VALIDATION, Interactions, SplitCounts
from training.data.ragged import Bag, pair, unpair

VectorsOf: TypeAlias = Callable[[NDArray[np.int64]], torch.Tensor]
"""Rows [N] (int64) -> vectors [N, E] (float32), on any one device."""

_logger = logging.getLogger(__name__)
_FEW_CAN_BE_HIT = 0.5  # of the test items: fewer are told in the log
_CHUNK_ITEMS = 1 << 14
_TILE_SCORES = 1 << 21  # 8 MB: stays in the cache between the product and the counting
_BLOCK_PAIRS = 1 << 16
# Equal vectors get scores that differ in their last bits, depending on where in a matrix product they stand, by a few
# times this, times sqrt(E) and both norms at most. What is that close counts as equal, and so ranks above a test item.
_ROUNDING = 2.0**-23


class EvaluatedUsers(NamedTuple):
    """U users and all that their metrics depend on, besides the vectors.

    Attributes:
        user_ids_U: ascending (int64, or objects of str).
        user_rows_U: (int64); MISSING_ROW for a user that is not in the training split.
        num_test_items_U: distinct test items (int64), those that can only be missed too.
        test_items: rows of the test items that are candidates, user after user.
        excluded_items: rows that are no candidates, user after user.
    """

    user_ids_U: NDArray[Any]
    user_rows_U: NDArray[np.int64]
    num_test_items_U: NDArray[np.int64]
    test_items: Bag
    excluded_items: Bag

    def take(self, users_N: NDArray[np.int64]) -> EvaluatedUsers:
        """Some of the users, in the order given. A rank's part is np.arange(rank, len(user_ids_U), world_size)."""
        return EvaluatedUsers(
            self.user_ids_U[users_N],
            self.user_rows_U[users_N],
            self.num_test_items_U[users_N],
            self.test_items.take(users_N),
            self.excluded_items.take(users_N),
        )


def evaluated_users(
    interactions: Interactions,
    vocabularies: Mapping[str, Vocabulary],
    split: int,
    *,
    max_users: int | None = None,
    seed: int = 0,
) -> EvaluatedUsers:
    """The users that have items in a split. Memory grows with those evaluated and with the split.

    A user's training items are no candidates, and its validation items neither where the test is measured. A test item
    that is among them stays in the denominators and is a miss, as in LightGCN's evaluation (SASRec's would rank it):
    the contract leaves those items out whatever they are. A test item that is not in the training split has no row
    and is a miss; all items of a user that is not in the training split are.

    Args:
        interactions: the data.
        vocabularies: of user_id and item_id, built from the training split; each item has a row of its own, or what is
            ranked are rows and not items.
        split: VALIDATION or TEST.
        max_users: where more have items in the split, so many drawn at random.
        seed: of that draw.
    """
    users, items = interactions.read_ids(split)
    order_U = pc.array_sort_indices(users.distinct_D).to_numpy()
    if max_users is not None and len(order_U) > max_users:
        drawn_U = np.random.default_rng(seed).choice(np.arange(len(order_U)), max_users, replace=False)
        order_U = order_U[np.sort(drawn_U)]
    number_of = np.full(len(users.distinct_D), -1)
    number_of[order_U] = np.arange(len(order_U))
    is_drawn_T = number_of[users.codes_T] >= 0
    users_T, items_T = unpair(np.unique(pair(number_of[users.codes_T], items.codes_T)[is_drawn_T]))
    user_ids = users.distinct_D.take(pa.array(order_U))
    user_rows_U = Values.of(user_ids).rows(vocabularies["user_id"])
    item_rows_T = Values(items.distinct_D, items_T).rows(vocabularies["item_id"])
    user_ids_U = user_ids.to_numpy(zero_copy_only=False)
    excluded = training_items(interactions, user_ids_U, vocabularies["item_id"], with_validation=split == TEST)
    has_row_T = (item_rows_T != MISSING_ROW) & (user_rows_U[users_T] != MISSING_ROW)
    pairs_T = pair(users_T, item_rows_T)
    ranked_T = has_row_T & ~np.isin(pairs_T, excluded.pairs())
    if len(ranked_T) and ranked_T.mean() <= _FEW_CAN_BE_HIT:
        _tell_misses(split, item_rows_T == MISSING_ROW, ~has_row_T, ranked_T)
    num_users = len(user_ids_U)
    num_test_items_U = np.bincount(users_T, minlength=num_users).astype(np.int64)
    tests = Bag.of_pairs(np.unique(pairs_T[ranked_T]), num_users)
    return EvaluatedUsers(user_ids_U, user_rows_U, num_test_items_U, tests, excluded)


def _tell_misses(
    split: int, item_unseen_T: NDArray[np.bool_], unseen_T: NDArray[np.bool_], ranked_T: NDArray[np.bool_]
) -> None:
    """Say in the log why few test items can be hit, or none, whatever the model is."""
    num_items, num_ranked = len(ranked_T), np.count_nonzero(ranked_T)
    num_item_unseen, num_user_unseen = np.count_nonzero(item_unseen_T), np.count_nonzero(unseen_T & ~item_unseen_T)
    reasons = {
        "are no items of the training rows": num_item_unseen,
        "are of users without training rows": num_user_unseen,
        "are items that their users have already": num_items - num_ranked - num_item_unseen - num_user_unseen,
    }
    told = ", ".join(f"{number} {reason}" for reason, number in reasons.items() if number)
    outcome = "all of its metrics are 0" if not num_ranked else "these count as missed"
    got = f"{num_ranked or 'none'} of the {num_items} held-out items can be recommended, whatever is learned"
    _logger.warning("%s: %s: %s; %s", SplitCounts._fields[split], got, told, outcome)


def training_items(
    interactions: Interactions,
    user_ids_U: NDArray[Any],
    item_vocabulary: Vocabulary,
    *,
    with_validation: bool = False,
) -> Bag:
    """The distinct item rows that users have in the training split. Memory grows with theirs alone.

    Args:
        interactions: the data.
        user_ids_U: ids of the users, distinct (int64, or objects of str); the result is in their order.
        item_vocabulary: of item_id; an item it does not know has no row and is left out.
        with_validation: those of the validation split too.
    """
    known_users = pa.array(user_ids_U, ARROW_TYPES[interactions.id_kinds["user_id"]])

    def number(users: Values) -> NDArray[np.int64]:
        """Where each user stands among those known; -1 where it does not."""
        numbers_D = pc.fill_null(pc.index_in(users.distinct_D, known_users), -1).to_numpy().astype(np.int64)
        return numbers_D[users.codes_T]

    splits = (TRAIN, VALIDATION) if with_validation else (TRAIN,)
    return Bag.of_pairs(user_item_pairs(interactions, number, item_vocabulary, splits), len(user_ids_U))


def evaluate(
    users: EvaluatedUsers,
    user_vectors: VectorsOf,
    item_vectors: VectorsOf,
    *,
    num_items: int,
    cutoffs: Sequence[int] = (10, 20),
) -> dict[str, NDArray[np.float64]]:
    """Recall and ndcg of each user, ranking all items by dot product (contract 2).

    recall@k is hits / the user's test items; ndcg@k has gains 1 / log2(rank + 1) and divides by the ideal over
    min(k, test items). A test item ranks below every other item of the same score; test items of the same score follow
    each other. A score that is not a number ranks last as a test item's and first as another's.

    user_vectors is called once, item_vectors 1 + ceil(num_items / 16384) times, whatever the users are, also for none:
    a collective may run in them. What stays in memory are the vectors of the users, and of their test items.

    Args:
        users: whom to measure; on several ranks each a part of them.
        user_vectors: of rows of users.
        item_vectors: of rows of items, 0 to num_items-1.
        num_items: rows of the item table.
        cutoffs: the ks.

    Returns:
        "recall@10", "ndcg@10", ... -> of each user [U] (float64).
    """
    ranks_UP = _ranks(users, user_vectors, item_vectors, num_items, max(cutoffs))
    gains = 1 / np.log2(np.arange(max(cutoffs)) + 2)
    ideal = np.append(np.nan, np.cumsum(gains))
    found = {}
    for k in cutoffs:
        hits_UP = ranks_UP < k
        dcg_U = np.where(hits_UP, gains[np.minimum(ranks_UP, len(gains) - 1)], 0).sum(1)
        found[f"recall@{k}"] = hits_UP.sum(1) / users.num_test_items_U
        found[f"ndcg@{k}"] = dcg_U / ideal[np.minimum(users.num_test_items_U, k)]
    return found


@torch.no_grad()
def _ranks(
    users: EvaluatedUsers, user_vectors: VectorsOf, item_vectors: VectorsOf, num_items: int, num_best: int
) -> NDArray[np.int64]:
    """How many candidates rank above each user's best test items [U, P], best first; num_best or more is too many."""
    ranked_A = np.flatnonzero(users.test_items.lengths)
    ranked = users.take(ranked_A)
    lengths_A = np.minimum(ranked.test_items.lengths, num_best)
    queries_AE = user_vectors(ranked.user_rows_U)
    thresholds_AP = _thresholds(queries_AE, ranked.test_items, item_vectors, lengths_A)
    counts_AP = torch.zeros_like(thresholds_AP, dtype=torch.int64)
    slots_P = np.arange(counts_AP.shape[1])
    # Not counted are excluded items and the test items, each of which is compared with the other items alone.
    hidden = (ranked.test_items, ranked.excluded_items)
    hidden_T = np.sort(np.concatenate([pair(bag.rows_T, bag.owners()) for bag in hidden]))
    for start in range(0, num_items, _CHUNK_ITEMS):
        items_NE = item_vectors(np.arange(start, min(start + _CHUNK_ITEMS, num_items)))
        lost_AP = (counts_AP.cpu().numpy() + slots_P >= num_best) | (slots_P >= lengths_A[:, None])
        live_A = lost_AP.shape[1] - lost_AP.sum(1)  # a prefix: thresholds fall, and so counts rise
        chunk = pair(np.array([start, start + len(items_NE)]), 0)
        begin, end = np.searchsorted(hidden_T, chunk)
        _count_chunk(queries_AE, items_NE, hidden_T[begin:end] - chunk[0], thresholds_AP, live_A, counts_AP)
    ranks_UP = np.full((len(users.user_ids_U), len(slots_P)), num_best)
    ranks_UP[ranked_A] = np.where(slots_P < lengths_A[:, None], counts_AP.cpu().numpy() + slots_P, num_best)
    return ranks_UP


def _thresholds(
    queries_UE: torch.Tensor, tests: Bag, item_vectors: VectorsOf, lengths_U: NDArray[np.int64]
) -> torch.Tensor:
    """What counts as scoring at least as much as each user's best test items [U, P] (float32), falling."""
    rows_R, at_T = np.unique(tests.rows_T, return_inverse=True)
    vectors_RE = item_vectors(rows_R)
    users_T = tests.owners()
    parts = [queries_UE.new_empty(0)]
    relative = _ROUNDING * vectors_RE.shape[1] ** 0.5
    for begin in range(0, len(users_T), _BLOCK_PAIRS):
        block = slice(begin, begin + _BLOCK_PAIRS)
        user_TE = queries_UE[_tensor(users_T[block], queries_UE)]
        item_TE = vectors_RE[_tensor(at_T[block], queries_UE)]
        margins_T = relative * user_TE.norm(dim=1) * item_TE.norm(dim=1)
        parts.append((user_TE * item_TE).sum(1) - margins_T)
    thresholds_T = torch.cat(parts).cpu().numpy()
    thresholds_T = thresholds_T[np.lexsort((-thresholds_T, users_T))]
    slots_T = np.arange(len(users_T)) - tests.offsets[users_T]
    best_T = slots_T < lengths_U[users_T]
    thresholds_UP = np.zeros((len(lengths_U), lengths_U.max(initial=0)), np.float32)
    thresholds_UP[users_T[best_T], slots_T[best_T]] = thresholds_T[best_T]
    return _tensor(thresholds_UP, queries_UE)


def _count_chunk(
    queries_UE: torch.Tensor,
    items_NE: torch.Tensor,
    hidden_T: NDArray[np.int64],
    thresholds_UP: torch.Tensor,
    live_U: NDArray[np.int64],
    counts_UP: torch.Tensor,
) -> None:
    """Add to counts_UP the items of a chunk that reach the thresholds; the first live_U of each user matter.

    hidden_T are `pair`s of an item of the chunk and a user that it is not counted for.
    """
    order_U = np.argsort(-live_U, kind="stable")[: np.count_nonzero(live_U)]
    place_of = np.full(len(live_U), len(live_U))
    place_of[order_U] = np.arange(len(order_U))
    items_T, users_T = unpair(hidden_T)
    places_T = place_of[users_T]
    by_place_T = np.argsort(places_T, kind="stable")
    places_T, items_T = places_T[by_place_T], items_T[by_place_T]
    tile_users = max(1, _TILE_SCORES // len(items_NE))
    for start in range(0, len(order_U), tile_users):
        users_B = _tensor(order_U[start : start + tile_users], queries_UE)
        begin, end = np.searchsorted(places_T, [start, start + len(users_B)])
        scores_BN = queries_UE[users_B] @ items_NE.t()
        hidden = _tensor(places_T[begin:end] - start, queries_UE), _tensor(items_T[begin:end], queries_UE)
        scores_BN[hidden] = -torch.inf
        live_B = live_U[order_U[start : start + tile_users]]
        for slot in range(live_B[0]):
            users_L = users_B[: np.count_nonzero(live_B > slot)]
            below_LN = scores_BN[: len(users_L)] < thresholds_UP[users_L, slot, None]
            counts_UP[users_L, slot] += len(items_NE) - below_LN.sum(1)


def _tensor(array: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
