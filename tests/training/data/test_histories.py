"""Histories beside sets of each user's items, gathered row by row."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.data.histories import Histories
from training.data.interactions import TEST, TRAIN, VALIDATION, Interactions
from training.data.vocabularies import VocabularyPolicy, build_vocabulary

NUM_USERS = 4
EXACT, MODULO = VocabularyPolicy(), VocabularyPolicy(kind="modulo", num_buckets=3)
ROWS = st.lists(
    st.tuples(st.integers(0, NUM_USERS - 1), st.integers(0, 30), st.sampled_from([TRAIN, VALIDATION, TEST]))
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("rows") / "rows.parquet"


def opened(path, rows, policy=EXACT, **options):
    """Rows of a user, an item and a split; one of training at least. Their vocabularies too."""
    users, items, splits = zip((0, 5, TRAIN), *rows, strict=True)
    columns = {"user_id": users, "item_id": [item * 1000 for item in items], "split": np.array(splits, np.int8)}
    pq.write_table(pa.table(columns), path)
    interactions = Interactions.open(path, **options)
    return interactions, {n: build_vocabulary(interactions, n, policy)[0] for n in ("user_id", "item_id")}


def sets_of(rows, vocabularies, splits=(TRAIN,)):
    """User row -> its item rows."""
    found = {}
    for user, item, split in [(0, 5, TRAIN), *rows]:
        if split in splits:
            user_row, item_row = (
                int(vocabularies[n].rows([i])[0]) for n, i in (("user_id", user), ("item_id", item * 1000))
            )
            found.setdefault(user_row, set()).add(item_row)
    return found


@pytest.mark.parametrize("policy", [EXACT, MODULO], ids=["exact", "modulo"])
@pytest.mark.parametrize("validation_trains", [False, True])
@given(rows=ROWS)
def test_a_user_row_has_the_items_of_its_training_rows_each_once(path, rows, validation_trains, policy):
    interactions, vocabularies = opened(path, rows, policy, validation_trains=validation_trains)
    expected = sets_of(rows, vocabularies, (TRAIN, VALIDATION) if validation_trains else (TRAIN,))
    users = np.arange(NUM_USERS + 3)[::-1].copy()
    found = Histories(interactions, vocabularies).whole(users)
    ends = found.offsets
    for number, user in enumerate(users.tolist()):
        items = found.rows_T[ends[number] : ends[number + 1]].tolist()
        assert items == sorted(expected.get(user, ()))


@given(rows=ROWS, most=st.integers(1, 6), seed=st.integers(0, 3))
def test_drawn_are_other_items_of_the_user_and_all_where_they_are_few(path, rows, most, seed):
    interactions, vocabularies = opened(path, rows)
    expected = sets_of(rows, vocabularies)
    users, items = np.array([(user, item) for user, chosen in expected.items() for item in chosen]).T
    rng = torch.Generator().manual_seed(seed)
    found = Histories(interactions, vocabularies).draw(users, items, most, rng)
    ends = found.offsets
    for number, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        others, drawn = expected[user] - {item}, found.rows_T[ends[number] : ends[number + 1]].tolist()
        assert len(drawn) == min(most, len(others))
        assert set(drawn) == others if len(others) <= most else set(drawn) <= others


def test_each_other_item_is_drawn_as_often(path):
    rows = [(1, item, TRAIN) for item in range(20)]
    interactions, vocabularies = opened(path, rows)
    ((user, item),) = {(int(vocabularies["user_id"].rows([1])[0]), int(vocabularies["item_id"].rows([7000])[0]))}
    histories, rng = Histories(interactions, vocabularies), torch.Generator().manual_seed(0)
    drawn = histories.draw(np.full(2000, user), np.full(2000, item), 5, rng).rows_T
    counts = np.bincount(drawn, minlength=20)
    assert counts[item] == 0
    expected = 2000 * 5 / 19  # each: a binomial count, of a standard deviation of 22
    assert np.abs(np.delete(counts, item) - expected).max() < 5 * expected**0.5
