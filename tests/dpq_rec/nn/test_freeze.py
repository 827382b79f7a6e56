"""Frozen tables held to the module that they came from, bit for bit."""

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec import ConfigError, DPQConfig, EmbeddingStore, Int64Vocabulary, verify
from dpq_rec.nn import DPQEmbeddingBagCollection, freeze

NUM_ROWS = 70_000  # more than one chunk


def tables():
    return [
        EmbeddingBagConfig(name="user_id", num_embeddings=NUM_ROWS, embedding_dim=8, feature_names=["user_id"]),
        EmbeddingBagConfig(name="item_id", num_embeddings=50, embedding_dim=16, feature_names=["item_id", "clicked"]),
    ]


def one_id_bags(num_ids):
    ids = torch.arange(num_ids)
    features = ["user_id", "item_id", "clicked"]
    values = torch.cat([ids, ids % 50, ids % 50])
    return KeyedJaggedTensor(keys=features, values=values, lengths=torch.ones(3 * num_ids, dtype=torch.long))


@pytest.fixture(params=[("sx", True), ("vq", True), ("vq", False)], ids=str)
def trained(request):
    """A model after some steps on a tenth of its rows."""
    method, batch_norm = request.param
    torch.manual_seed(0)
    config = DPQConfig(method=method, num_subspaces=4, num_codes=11, batch_norm=batch_norm)
    ebc = DPQEmbeddingBagCollection(tables(), config)
    optimizer = torch.optim.Adam(ebc.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ebc(one_id_bags(NUM_ROWS // 10)).values().square().sum().backward()
        optimizer.step()
    return ebc


def test_artifact_holds_what_eval_mode_returns_bit_for_bit(trained, tmp_path):
    freeze(trained, tmp_path / "artifact")
    pooled = trained.eval()(one_id_bags(NUM_ROWS))
    store = EmbeddingStore.open(tmp_path / "artifact")
    for name, num_rows in (("user_id", NUM_ROWS), ("item_id", 50)):
        vectors, missing = store.lookup(name, np.arange(num_rows))
        assert vectors.tobytes() == pooled[name][:num_rows].detach().numpy().tobytes()
        assert not len(missing)


def test_freeze_encodes_in_eval_mode_and_leaves_the_mode_as_it_was(trained, tmp_path):
    freeze(trained.train(), tmp_path / "training")
    assert trained.training
    freeze(trained.eval(), tmp_path / "eval")
    for name in ("user_id", "item_id"):
        stored = [
            EmbeddingStore.open(tmp_path / mode).tables[name].tensors["packed_codes"] for mode in ("training", "eval")
        ]
        assert np.array_equal(*stored)


def test_artifact_holds_zero_where_pooling_makes_zero_of_minus_zero(tmp_path):
    ebc = DPQEmbeddingBagCollection(tables(), DPQConfig(num_subspaces=4, num_codes=11))
    ebc.quantizer("item_id").values_MKS.data.fill_(-0.0)
    freeze(ebc, tmp_path / "artifact")
    pooled = ebc.eval()(one_id_bags(50))["item_id"][:50]
    vectors = EmbeddingStore.open(tmp_path / "artifact").lookup("item_id", np.arange(50)).vectors
    assert vectors.tobytes() == pooled.detach().numpy().tobytes()


def test_freeze_writes_an_artifact_that_verifies(trained, tmp_path):
    freeze(trained, tmp_path / "artifact", version="seven")
    artifact = verify(tmp_path / "artifact")
    assert artifact.version == "seven"
    assert artifact.tables["item_id"].manifest.features == ("item_id", "clicked")


def test_freeze_stores_vocabularies(trained, tmp_path):
    vocabulary = Int64Vocabulary.from_ids(np.arange(50) * 1000)
    freeze(trained, tmp_path / "artifact", vocabularies={"item_id": vocabulary})
    store = EmbeddingStore.open(tmp_path / "artifact")
    pooled = trained.eval()(one_id_bags(50))
    vectors, missing = store.lookup("item_id", [7000, 7, 49_000])
    assert missing.tolist() == [1]
    assert np.array_equal(vectors[[0, 2]], pooled["item_id"][[7, 49]].detach().numpy())


def test_freeze_stores_plain_tables_as_they_are(tmp_path):
    ebc = EmbeddingBagCollection(tables=tables())
    freeze(ebc, tmp_path / "artifact")
    store = EmbeddingStore.open(tmp_path / "artifact")
    assert store.tables["user_id"].manifest.kind == "dense"
    want = ebc.embedding_bags["user_id"].weight.detach().numpy()
    assert np.array_equal(store.lookup("user_id", np.arange(NUM_ROWS)).vectors, want)


def test_freeze_reports_rows_as_it_writes_them(trained, tmp_path):
    written = []
    freeze(trained, tmp_path / "artifact", progress=written.append)
    assert sum(written) == NUM_ROWS + 50


@pytest.mark.parametrize(
    ("model", "vocabularies", "message"),
    [
        (nn.Linear(2, 2), {}, "holds no DPQ module"),
        (EmbeddingBagCollection(tables=tables()), {"usr": None}, "got usr; the model's tables: user_id, item_id"),
        (
            nn.ModuleList([EmbeddingBagCollection(tables=tables()), EmbeddingBagCollection(tables=tables())]),
            {},
            "two tables of the model are named user_id",
        ),
    ],
)
def test_freeze_rejects(model, vocabularies, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        freeze(model, tmp_path / "artifact", vocabularies=vocabularies)


def test_freeze_leaves_an_existing_folder_alone(trained, tmp_path):
    (tmp_path / "artifact").mkdir()
    with pytest.raises(FileExistsError):
        freeze(trained, tmp_path / "artifact")
