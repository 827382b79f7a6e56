import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpq_rec import EmbeddingStore, Int64Vocabulary
from dpq_rec.artifact import TableContents, write_artifact
from training.data import files
from training.data.histories import Histories
from training.data.interactions import TEST, TRAIN, VALIDATION, Interactions
from training.data.ragged import Bag
from training.data.vocabularies import VocabularyPolicy, build_vocabulary, count_ids
from training.distributed import process_group
from training.evaluation import ranking as module
from training.evaluation.ranking import EvaluatedUsers, evaluate, evaluated_users, training_items
from training.evaluation.retrieval import Retrieval
from training.recipes.two_tower import TwoTowerOptions

DATA = Path(os.environ.get("TEST_DATA_DIR", Path(__file__).parents[4] / "shared" / "data"))


def naive_metrics(rows, split, score, cutoffs, *, everyone=False):
    """Contract 2 by sorting. rows: (user, item, split); score: of a user's and an item's id.

    everyone: whether users that are not in training have a vector.
    """
    items_of = {each: defaultdict(set) for each in (TRAIN, VALIDATION, TEST)}
    for user, item, of in rows:
        items_of[of][user].add(item)
    catalogue = {item for _, item, of in rows if of == TRAIN}
    seen_users = set(items_of[TRAIN])
    metrics = {}
    for user, wanted in items_of[split].items():
        left_out = items_of[TRAIN][user] | (items_of[VALIDATION][user] if split == TEST else set())
        candidates = sorted(catalogue - left_out, key=lambda item: (-score(user, item), item in wanted))
        ranking = candidates if everyone or user in seen_users else []
        metrics[user] = []
        for k in cutoffs:
            hits = [rank for rank, item in enumerate(ranking[:k]) if item in wanted]
            ideal = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(wanted))))
            metrics[user] += [len(hits) / len(wanted), sum(1 / math.log2(rank + 2) for rank in hits) / ideal]
    return metrics


def open_rows(path, rows, *, strings=False):
    users, items, splits = zip(*rows, strict=True)
    if strings:  # two digits, so that strings and numbers have the same order
        columns = {"user_id": [f"{user:02}" for user in users], "item_id": [f"{item:02}" for item in items]}
    else:
        columns = {"user_id": pa.array(users, pa.int64()), "item_id": pa.array(items, pa.int64())}
    pq.write_table(pa.table({**columns, "split": pa.array(splits, pa.int8())}), path)
    return Interactions.open(path)


def vocabularies(interactions):
    return {c: build_vocabulary(interactions, c)[0] for c in ("user_id", "item_id")}


def means(found):
    return {name: values_U.mean() for name, values_U in found.items()}


def values(found):
    """Of each user and metric [U, C]."""
    return np.stack([*found.values()], 1)


def from_table(vectors_VE):
    return lambda rows: vectors_VE[torch.from_numpy(rows)]


def users_with(tests, excluded, num_misses=0):
    """One user for each list of test items, with as many more test items that have no row."""
    num_users = len(tests)

    def user_items(lists):
        return Bag.of(
            np.array([item for items in lists for item in items], np.int64), np.array([*map(len, lists)], int)
        )

    counts = np.array([len(items) + num_misses for items in tests], np.int64)
    return EvaluatedUsers(np.arange(num_users), np.arange(num_users), counts, user_items(tests), user_items(excluded))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


ROWS = st.tuples(st.integers(0, 4), st.integers(10, 21), st.sampled_from([TRAIN, TRAIN, VALIDATION, TEST, TEST]))


class TestAgainstSorting:
    @settings(max_examples=150)
    @given(
        rows=st.lists(ROWS, min_size=1, max_size=70),
        split=st.sampled_from([VALIDATION, TEST]),
        cutoffs=st.sampled_from([(10, 20), (1, 3), (2,)]),
        vectors=st.lists(st.integers(-1, 1), min_size=34, max_size=34),
        chunk_items=st.integers(1, 15),
        tile_scores=st.integers(1, 40),
    )
    def test_metrics_are_those_of_a_sorted_ranking_with_test_items_last_among_equals(
        self, folder, rows, split, cutoffs, vectors, chunk_items, tile_scores
    ):
        rows = [*rows, (0, 10, TRAIN)]
        interactions = open_rows(folder / "rows.parquet", rows)
        known = vocabularies(interactions)
        user_vectors = np.array(vectors[:10], np.float32).reshape(5, 2)
        item_vectors = np.array(vectors[10:], np.float32).reshape(12, 2)
        expected = naive_metrics(rows, split, lambda u, i: float(user_vectors[u] @ item_vectors[i - 10]), cutoffs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_CHUNK_ITEMS", chunk_items)
            patch.setattr(module, "_TILE_SCORES", tile_scores)
            users = evaluated_users(interactions, known, split)
            found = evaluate(
                users,
                from_table(torch.from_numpy(user_vectors[count_ids(interactions, "user_id")[0]])),
                from_table(torch.from_numpy(item_vectors[count_ids(interactions, "item_id")[0].to_numpy() - 10])),
                num_items=len(known["item_id"].ids_U),
                cutoffs=cutoffs,
            )
        assert tuple(found) == tuple(f"{name}@{k}" for k in cutoffs for name in ("recall", "ndcg"))
        assert users.user_ids_U.tolist() == sorted(expected)
        np.testing.assert_allclose(values(found), [expected[u] for u in sorted(expected)] or values(found))

    def test_popularity_on_movielens_1m(self):
        path = DATA / "movielens_1m" / "interactions.parquet"
        if not path.exists():
            pytest.skip(f"no {path}: set TEST_DATA_DIR")
        interactions = Interactions.open(path)
        known = vocabularies(interactions)
        ids, counts = count_ids(interactions, "item_id")
        popularity = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        table = torch.tensor([[float(popularity[i])] for i in ids.tolist()])
        users = evaluated_users(interactions, known, TEST)
        found = evaluate(users, lambda rows: torch.ones(len(rows), 1), from_table(table), num_items=3416)
        table = pq.read_table(path)
        table = table.filter(np.isin(table["user_id"], users.user_ids_U[:150]))
        rows = list(zip(*(table[name].to_pylist() for name in ("user_id", "item_id", "split")), strict=True))
        rows += [(-1, item, TRAIN) for item in popularity]
        expected = naive_metrics(rows, TEST, lambda user, item: popularity[item], (10, 20))
        np.testing.assert_allclose(values(found)[:150], [expected[user] for user in sorted(expected)])
        assert means(found)["recall@10"] == pytest.approx(0.03692, abs=1e-5)


class TestEvaluate:
    @pytest.mark.parametrize("embedding_dim", [1, 3, 64, 257])
    def test_ranks_a_test_item_below_equal_vectors_wherever_they_stand(self, embedding_dim):
        torch.manual_seed(embedding_dim)
        items = torch.randn(1, embedding_dim).repeat(5_003, 1)
        users = torch.randn(300, embedding_dim)
        found = evaluate(
            users_with([[i * 16] for i in range(300)], [[]] * 300),
            from_table(users),
            from_table(items),
            num_items=5_003,
        )
        assert means(found) == {"recall@10": 0, "ndcg@10": 0, "recall@20": 0, "ndcg@20": 0}

    def test_tells_apart_scores_that_differ_by_more_than_rounding(self):
        items = torch.tensor([[1.0], [1 - 1e-5], [1 - 2e-5]])
        found = evaluate(
            users_with([[0], [1], [2]], [[]] * 3),
            lambda rows: torch.ones(len(rows), 1),
            from_table(items),
            num_items=3,
            cutoffs=(1, 2, 3),
        )
        assert values(found)[:, ::2].tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]

    def test_gives_log2_gains_over_the_ideal(self):
        items = torch.arange(5, 0, -1.0)[:, None]
        users = users_with([[1, 3]], [[0]], num_misses=1)
        found = evaluate(users, lambda rows: torch.ones(len(rows), 1), from_table(items), num_items=5, cutoffs=(2, 4))
        first, second, third = 1, 1 / math.log2(3), 1 / 2
        expected = [1 / 3, first / (first + second), 2 / 3, (first + third) / (first + second + third)]
        np.testing.assert_allclose(values(found), [expected])

    def test_ranks_more_test_items_than_the_cutoff(self):
        items = torch.arange(50, 0, -1.0)[:, None]
        users = users_with([list(range(40))], [[]])
        found = evaluate(users, lambda rows: torch.ones(len(rows), 1), from_table(items), num_items=50)
        np.testing.assert_allclose(values(found), [[10 / 40, 1, 20 / 40, 1]])

    @pytest.mark.parametrize("broken", ["users", "items", "test item"])
    def test_never_rewards_vectors_that_are_not_numbers(self, broken):
        users, items = torch.ones(2, 4), torch.rand(100, 4)
        items[7] = 2
        for each in {"users": [users], "items": [items], "test item": [items[7]]}[broken]:
            each[:] = torch.nan
        found = evaluate(users_with([[7], [7]], [[], []]), from_table(users), from_table(items), num_items=100)
        assert not values(found).any()

    def test_calls_for_vectors_equally_often_whatever_the_users(self, monkeypatch):
        monkeypatch.setattr(module, "_CHUNK_ITEMS", 4)

        def count_calls(tests):
            calls = []

            def vectors(rows):
                calls.append(len(rows))
                return torch.ones(len(rows), 2)

            evaluate(users_with(tests, [[]] * len(tests), num_misses=1), vectors, vectors, num_items=10)
            return len(calls)

        assert count_calls([]) == count_calls([[1], [2, 3]]) == count_calls([[]]) == 2 + 3

    def test_of_parts_of_the_users_adds_up_to_the_whole(self):
        rng = np.random.default_rng(0)
        num_users, num_items = 41, 90
        tests = [rng.choice(num_items, rng.integers(1, 30), replace=False) for _ in range(num_users)]
        excluded = [np.setdiff1d(rng.choice(num_items, rng.integers(30)), items) for items in tests]
        users = users_with(tests, excluded)
        vectors = from_table(torch.randn(num_users, 5)), from_table(torch.randn(num_items, 5))
        whole = evaluate(users, *vectors, num_items=num_items)
        parts = [evaluate(users.take(np.arange(r, num_users, 3)), *vectors, num_items=num_items) for r in range(3)]
        assert sum(map(len, map(values, parts))) == num_users
        np.testing.assert_allclose(sum(values(part).sum(0) for part in parts), values(whole).sum(0))

    def test_of_nobody_has_sums(self):
        found = evaluate(
            users_with([], []),
            lambda rows: torch.ones(len(rows), 2),
            lambda rows: torch.ones(len(rows), 2),
            num_items=3,
        )
        assert values(found).sum(0).tolist() == [0, 0, 0, 0]


class TestEvaluatedUsers:
    @settings(max_examples=60)
    @given(
        rows=st.lists(ROWS, min_size=1, max_size=70),
        split=st.sampled_from([VALIDATION, TEST]),
        max_users=st.sampled_from([None, 2]),
        piece_rows=st.integers(1, 20),
    )
    def test_are_the_same_for_string_ids_as_for_the_numbers_they_stand_for(
        self, folder, rows, split, max_users, piece_rows
    ):
        rows = [*rows, (0, 10, TRAIN)]
        both = open_rows(folder / "numbers.parquet", rows), open_rows(folder / "strings.parquet", rows, strings=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_PIECE_ROWS", piece_rows)
            numbers, strings = (evaluated_users(each, vocabularies(each), split, max_users=max_users) for each in both)
        assert [f"{each:02}" for each in numbers.user_ids_U] == strings.user_ids_U.tolist()
        for one, other in zip(numbers[1:3], strings[1:3], strict=True):
            assert one.tolist() == other.tolist()
        for one, other in zip(numbers[3:], strings[3:], strict=True):
            assert [each.tolist() for each in one] == [each.tolist() for each in other]

    def test_keeps_in_the_denominators_what_can_only_be_missed(self, tmp_path):
        rows = [
            (1, 5, TRAIN),
            (1, 6, TRAIN),
            (2, 7, TRAIN),
            (2, 8, VALIDATION),
            (1, 6, TEST),
            (1, 7, TEST),
            (1, 7, TEST),
            (1, 99, TEST),
            (3, 5, TEST),
        ]
        interactions = open_rows(tmp_path / "a.parquet", rows)
        users = evaluated_users(interactions, vocabularies(interactions), TEST)
        assert users.user_ids_U.tolist() == [1, 3]
        assert users.user_rows_U.tolist() == [0, -1]
        assert users.num_test_items_U.tolist() == [3, 1]
        assert users.test_items.offsets.tolist() == [0, 1, 1]
        assert users.test_items.rows_T.tolist() == [2]

    def test_draws_as_many_users_as_asked(self, tmp_path):
        rows = [(user, item, split) for user in range(30) for item, split in ((1, TRAIN), (2, TRAIN), (3, TEST))]
        interactions = open_rows(tmp_path / "a.parquet", [*rows, (0, 3, TRAIN)])
        known = vocabularies(interactions)
        draws = [evaluated_users(interactions, known, TEST, max_users=7, seed=seed) for seed in (0, 0, 1)]
        ids = [draw.user_ids_U.tolist() for draw in draws]
        assert ids[0] == ids[1] == sorted(set(ids[0])) != ids[2]
        assert {len(each) for each in ids} == {7}
        assert np.diff(draws[0].excluded_items.offsets).tolist() == [2 + (user == 0) for user in ids[0]]
        assert len(evaluated_users(interactions, known, TEST, max_users=30).user_ids_U) == 30

    def test_training_items_leave_out_validation_unless_asked(self, tmp_path):
        rows = [
            (4, 1, TRAIN),
            (4, 1, TRAIN),
            (4, 2, VALIDATION),
            (4, 3, TEST),
            (5, 2, TRAIN),
            (5, 3, TRAIN),
            (6, 3, TRAIN),
        ]
        interactions = open_rows(tmp_path / "a.parquet", rows)
        items = Int64Vocabulary.from_ids([3, 2, 1])
        found = training_items(interactions, np.array([4, 5]), items)
        assert [found.offsets.tolist(), found.rows_T.tolist()] == [[0, 1, 3], [2, 0, 1]]
        found = training_items(interactions, np.array([4, 5]), items, with_validation=True)
        assert [found.offsets.tolist(), found.rows_T.tolist()] == [[0, 2, 4], [1, 2, 0, 1]]


POLICIES = {
    "exact": VocabularyPolicy(),
    "shared rows for rare ids": VocabularyPolicy(min_count=3, rare_buckets=2),
    "modulo": VocabularyPolicy(kind="modulo", num_buckets=7),
}


class TestRetrieval:
    @pytest.mark.parametrize(
        ("policy", "strings"), [*((name, False) for name in POLICIES), ("shared rows for rare ids", True)]
    )
    @pytest.mark.parametrize("history", [0, 3])
    def test_ranks_items_and_not_the_rows_they_share(self, tmp_path, policy, strings, history):
        rng = np.random.default_rng(0)
        pairs = zip(rng.integers(0, 30, 400).tolist(), rng.integers(40, 90, 400).tolist(), strict=True)
        rows = [(u, i, int(rng.choice([TRAIN, TRAIN, VALIDATION, TEST]))) for u, i in pairs]
        rows += [(77, 40, TEST), (77, 41, TEST)]  # a user that is not in training
        interactions = open_rows(tmp_path / "rows.parquet", rows, strings=strings)
        columns = {n: build_vocabulary(interactions, n, POLICIES[policy]) for n in ("user_id", "item_id")}
        known = {name: vocabulary for name, (vocabulary, _) in columns.items()}
        vectors, tables = [], {}
        for name, (vocabulary, counts_V) in columns.items():
            vectors.append(rng.normal(size=(len(counts_V), 3)).astype(np.float32))
            sizes = {"num_embeddings": len(counts_V), "embedding_dim": 3}
            tables[name] = TableContents(**sizes, vocabulary=vocabulary, chunks=[vectors[-1]])
        store = EmbeddingStore.open(write_artifact(tmp_path / "artifact", tables))
        rows_of = [known[name].rows for name in ("user_id", "item_id")]

        def row_of(column, each):
            return int(rows_of[column]([f"{each:02}" if strings else each])[0])

        chosen = {}  # user row -> the item rows of its training rows
        for user, item, split in rows:
            if split == TRAIN and history:
                chosen.setdefault(row_of(0, user), set()).add(row_of(1, item))

        def score(user, item):
            user_vector = vectors[0][row_of(0, user)]
            if history:  # all of them, however many a step would draw; a user that does not train has none
                own = chosen.get(row_of(0, user))
                user_vector = np.mean([vectors[1][row] for row in own], 0) if own else np.zeros(3)
            return round(float(user_vector @ vectors[1][row_of(1, item)]), 5)

        for split in (VALIDATION, TEST):
            expected = naive_metrics(rows, split, score, (10, 20), everyone=policy == "modulo")
            with process_group(torch.device("cpu")):
                histories = Histories(interactions, known) if history else None
                options = TwoTowerOptions(similarity="dot", history=history)
                found = Retrieval(interactions, known, options, histories).measure(store, split)
            assert list(found.values()) == pytest.approx(np.mean(list(expected.values()), 0))


TRAINING = [(user, item, TRAIN) for user in range(3) for item in range(3)]


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (
            [(0, 10), (1, 11)],
            "none of the 2 held-out items can be recommended, whatever is learned: "
            "2 are no items of the training rows; all of its metrics are 0",
        ),
        (
            [(8, 1), (9, 12), (0, 1)],
            "none of the 3 held-out items can be recommended, whatever is learned: "
            "1 are no items of the training rows, 1 are of users without training rows, "
            "1 are items that their users have already; all",
        ),
        (
            [(0, 4), (1, 11), (1, 12)],
            "1 of the 3 held-out items can be recommended, whatever is learned: "
            "2 are no items of the training rows; these count as missed",
        ),
        ([(0, 4), (1, 4), (1, 12)], None),
    ],
    ids=["new items", "every reason", "some", "most"],
)
@pytest.mark.parametrize(("split", "name"), [(VALIDATION, "validation"), (TEST, "test")])
def test_held_out_items_that_cannot_be_hit_are_told(tmp_path, caplog, held_out, message, split, name):
    rows = [*TRAINING, (3, 4, TRAIN), *((user, item, split) for user, item in held_out)]
    interactions = open_rows(tmp_path / "a.parquet", rows)
    evaluated_users(interactions, vocabularies(interactions), split)
    assert [record.getMessage()[: len(f"{name}: {message}")] for record in caplog.records] == (
        [f"{name}: {message}"] if message else []
    )
