import hashlib
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from dpq_rec import ConfigError
from training.data import synthetic as module
from training.data.batches import train_batches
from training.data.interactions import TEST, TRAIN, VALIDATION, Interactions
from training.data.synthetic import SyntheticConfig, generate
from training.data.vocabularies import build_vocabulary, count_ids
from training.evaluation.ranking import evaluate, evaluated_users


def read(folder):
    table = pq.read_table(folder)
    return [table[name].to_numpy() for name in ("user_id", "item_id", "split")]


@pytest.fixture
def one_thread():
    """Small products are slower on two threads, and very slow where the machine has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def configs(draw):
    num_users, num_held_out = draw(st.integers(1, 60)), draw(st.integers(0, 70))
    least = num_users + 2 * min(num_users, num_held_out)
    return SyntheticConfig(
        num_users=num_users,
        num_items=draw(st.integers(3, 80)),
        num_interactions=least + draw(st.integers(0, 400)),
        num_held_out_users=num_held_out,
        seed=draw(st.integers(0, 3)),
    )


class TestGenerate:
    @settings(max_examples=60)
    @given(config=configs(), block_rows=st.integers(20, 300))
    def test_gives_the_rows_asked_for_and_every_user_and_item(self, tmp_path_factory, config, block_rows):
        folder = tmp_path_factory.mktemp("synthetic") / "data"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_BLOCK_ROWS", block_rows)
            users, items, splits = read(generate(config, folder))
        assert len(users) == config.num_interactions
        assert len(np.unique(users[splits == TRAIN])) == config.num_users
        spare = config.num_interactions - config.num_held_out_rows - config.num_users
        assert min(config.num_items, spare) <= len(np.unique(items[splits == TRAIN])) <= config.num_items
        assert (splits == TEST).sum() == (splits == VALIDATION).sum() <= config.num_held_out_rows // 2

    def test_holds_out_two_items_the_user_has_nowhere_else(self, tmp_path):
        config = SyntheticConfig(num_users=300, num_items=500, num_interactions=9_000, num_held_out_users=200)
        users, items, splits = read(generate(config, tmp_path / "data"))
        held = splits != TRAIN
        assert 150 <= (splits == TEST).sum() <= 200
        assert np.array_equal(np.unique(users[splits == TEST]), np.unique(users[splits == VALIDATION]))
        assert len(np.unique(users[splits == TEST])) == (splits == TEST).sum()
        pairs = users * (1 << 10) + np.unique(items, return_inverse=True)[1]
        assert not np.isin(pairs[held], pairs[~held]).any()
        assert len(np.unique(pairs[held])) == held.sum()

    def test_places_held_out_rows_last_as_the_default_split_would(self, tmp_path):
        config = SyntheticConfig(num_users=50, num_items=100, num_interactions=1_000)
        users, _, splits = read(generate(config, tmp_path / "data"))
        for user in np.unique(users[splits == TEST]):
            assert splits[users == user][-2:].tolist() == [VALIDATION, TEST]

    def test_is_the_same_for_the_same_settings_alone(self, tmp_path):
        settings_of = {"num_users": 100, "num_items": 50, "num_interactions": 1_000}
        same = [read(generate(SyntheticConfig(**settings_of), tmp_path / name)) for name in "ab"]
        other = read(generate(SyntheticConfig(**settings_of, seed=1), tmp_path / "c"))
        assert all(np.array_equal(a, b) for a, b in zip(*same, strict=True))
        assert not np.intersect1d(same[0][0], other[0]).size

    def test_of_settings_without_clicks_gives_the_rows_it_always_gave(self, tmp_path):
        config = SyntheticConfig(num_users=200, num_items=100, num_interactions=4_000, num_held_out_users=50, seed=3)
        columns = read(generate(config, tmp_path / "data"))
        digest = hashlib.sha256(b"".join(each.astype("<i8").tobytes() for each in columns)).hexdigest()
        assert digest == "503bc8a919e70422e34c751d82d4b4ce680e46d17382f61a30c3d8bb9f5b8289"
        assert (tmp_path / "data" / "_synthetic.json").read_text() == (
            '{"format": 1, "num_users": 200, "num_items": 100, "num_interactions": 4000, '
            '"num_held_out_users": 50, "seed": 3}'
        )

    def test_with_clicks_and_string_ids_has_the_same_rows(self, tmp_path):
        sizes = {"num_users": 200, "num_items": 100, "num_interactions": 4_000}
        plain = read(generate(SyntheticConfig(**sizes), tmp_path / "plain"))
        config = SyntheticConfig(**sizes, with_clicks=True, string_ids=True)
        told = pq.read_table(generate(config, tmp_path / "told"))
        again = pq.read_table(generate(config, tmp_path / "again"))
        assert told.equals(again)
        for column, name in ((plain[0], "user"), (plain[1], "item")):
            assert told[f"{name}_id"].to_pylist() == [f"{name}-{each:012x}" for each in column]
        assert np.array_equal(told["split"], plain[2])

    def test_scatters_ids_over_48_bits(self, tmp_path):
        config = SyntheticConfig(num_users=1_000, num_items=500, num_interactions=5_000)
        users, items, _ = read(generate(config, tmp_path / "data"))
        for ids in (np.unique(users), np.unique(items)):
            assert 0 <= ids[0] < 1 << 42
            assert 1 << 47 < ids[-1] < 1 << 48
        assert not np.intersect1d(users, items).size

    def test_has_power_laws_of_items_and_users(self, tmp_path):
        config = SyntheticConfig(num_users=5_000, num_items=5_000, num_interactions=100_000)
        users, items, _ = read(generate(config, tmp_path / "data"))
        for ids, share in ((items, 0.08), (users, 0.05)):
            counts = np.sort(np.unique(ids, return_counts=True)[1])[::-1]
            assert counts[:50].sum() > share * len(ids)
            assert counts[2_500:].sum() < 0.35 * len(ids)

    def test_takes_a_folder_that_holds_it_already_and_no_other(self, tmp_path):
        config = SyntheticConfig(num_users=10, num_items=10, num_interactions=100)
        folder = generate(config, tmp_path / "data")
        written = (folder / "part-00000.parquet").stat().st_mtime_ns
        assert generate(config, folder) == folder
        assert (folder / "part-00000.parquet").stat().st_mtime_ns == written
        with pytest.raises(ConfigError, match="got another population or other files"):
            generate(SyntheticConfig(num_users=11, num_items=10, num_interactions=100), folder)

    def test_starts_again_where_it_was_interrupted(self, tmp_path, monkeypatch):
        config = SyntheticConfig(num_users=100, num_items=10, num_interactions=1_000)
        monkeypatch.setattr(module, "_BLOCK_ROWS", 100)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_draw_items", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                generate(config, tmp_path / "data")
        assert not (tmp_path / "data").exists()
        assert len(read(generate(config, tmp_path / "data"))[0]) == 1_000
        assert [path.name for path in tmp_path.iterdir()] == ["data"]

    def test_holds_a_block_not_the_data(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_BLOCK_ROWS", 1 << 13)
        config = SyntheticConfig(num_users=5_000, num_items=5_000, num_interactions=500_000)
        tracemalloc.start()
        try:
            generate(config, tmp_path / "data")
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak_bytes < 500_000 * 16 / 2

    def test_has_tastes_that_a_full_table_learns_well_above_popularity(self, tmp_path, one_thread):
        config = SyntheticConfig(num_users=1_000, num_items=500, num_interactions=30_000)
        interactions = Interactions.open(generate(config, tmp_path / "data"))
        known = {c: build_vocabulary(interactions, c)[0] for c in ("user_id", "item_id")}
        users = evaluated_users(interactions, known, TEST)
        popularity = torch.from_numpy(count_ids(interactions, "item_id")[1].astype(np.float32))
        popular = evaluate(
            users, lambda rows: torch.ones(len(rows), 1), lambda rows: popularity[rows, None], num_items=500
        )
        user_VE, item_VE = train_full_tables(interactions, known)
        learnt = evaluate(users, lambda rows: user_VE[rows], lambda rows: item_VE[rows], num_items=500)
        learnt_recall, popular_recall = (found["recall@20"].mean() for found in (learnt, popular))
        assert learnt_recall > 0.25
        assert learnt_recall > 2 * popular_recall > 0


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    config = SyntheticConfig(num_users=500, num_items=300, num_interactions=20_000, with_clicks=True)
    return pq.read_table(generate(config, tmp_path_factory.mktemp("clicks") / "data"))


class TestClicks:
    def test_features_are_of_each_kind_and_belong_to_user_item_and_moment(self, clicks):
        rows = clicks.to_pylist()
        assert clicks["price"].type == pa.float32()
        assert len({row["price"] for row in rows}) > 0.99 * len(rows)
        for column, owner in (("segment", "user_id"), ("tags", "item_id")):
            assert len({(row[owner], str(row[column])) for row in rows}) == len({row[owner] for row in rows})
        assert {len(row["tags"]) for row in rows} == {0, 1, 2, 3}
        assert len({row["segment"] for row in rows}) == 5
        assert 0.3 < np.mean(clicks["label"]) < 0.7

    @pytest.mark.parametrize("kept", ["price", "segment", "tags", "all"])
    def test_each_feature_says_something_of_the_clicks_of_other_rows(self, clicks, kept):
        rows = clicks.select(["price", "segment", "tags"]).to_pylist()
        told = []
        for row in rows:
            features = {"price": {"price": row["price"] / 5}, "segment": {row["segment"]: 1}}
            features["tags"] = {tag: row["tags"].count(tag) for tag in row["tags"]}
            told.append({k: v for name, each in features.items() if kept in (name, "all") for k, v in each.items()})
        table, labels = DictVectorizer().fit_transform(told), clicks["label"].to_numpy()
        model = LogisticRegression(max_iter=500).fit(table[::2], labels[::2])
        found = roc_auc_score(labels[1::2], model.decision_function(table[1::2]))
        assert found > {"price": 0.66, "segment": 0.6, "tags": 0.58, "all": 0.75}[kept]
        shuffled = np.random.default_rng(0).permutation(labels[1::2])
        assert roc_auc_score(shuffled, model.decision_function(table[1::2])) == pytest.approx(0.5, abs=0.02)


def train_full_tables(interactions, known):
    """Unit vectors of all users and items after a few epochs of softmax over all items."""
    generator = torch.Generator().manual_seed(0)
    tables = [
        torch.nn.Parameter(torch.randn(len(known[c].ids_U), 16, generator=generator) / 4)
        for c in ("user_id", "item_id")
    ]
    optimizer = torch.optim.Adam(tables, lr=0.03)
    for epoch in range(5):
        for batch in train_batches(interactions, known, batch_size=512, epoch=epoch):
            users_B, items_B = (batch.bags[c].rows_T for c in ("user_id", "item_id"))
            user_VE, item_VE = (functional.normalize(table, dim=1) for table in tables)
            loss = functional.cross_entropy(user_VE[users_B] @ item_VE.t() / 0.1, torch.from_numpy(items_B))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [functional.normalize(table.detach(), dim=1) for table in tables]


class TestSyntheticConfig:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"num_users": 0}, "num_users: got 0, want at least 1"),
            ({"num_items": 2}, "num_items: got 2, want at least 3"),
            ({"num_held_out_users": -1}, "num_held_out_users: got -1, want at least 0"),
            ({"seed": -1}, "seed: got -1, want at least 0"),
            (
                {"num_interactions": 29},
                "num_interactions: got 29, want at least 30: one for each of 10 users and 20 held",
            ),
        ],
    )
    def test_refuses(self, wrong, message):
        with pytest.raises(ConfigError, match=message):
            SyntheticConfig(**{"num_users": 10, "num_items": 10, "num_interactions": 100, **wrong})


@pytest.mark.parametrize("bits", [8, 12])
def test_mix_is_a_bijection(monkeypatch, bits):
    monkeypatch.setattr(module, "_ID_BITS", bits)
    mixed = module._mix(np.arange(1 << bits, dtype=np.uint64))
    assert np.array_equal(np.sort(mixed), np.arange(1 << bits))
    assert abs(np.corrcoef(mixed, np.arange(1 << bits))[0, 1]) < 0.2
