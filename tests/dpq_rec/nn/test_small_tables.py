"""Tables that codes and values make no smaller: they stay plain, it is said, and they are frozen as they are."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType

from dpq_rec import DPQConfig, EmbeddingStore
from dpq_rec.nn import (
    DPQEmbedding,
    DPQEmbeddingBag,
    DPQEmbeddingBagCollection,
    DPQEmbeddingCollection,
    freeze,
    replace_embeddings,
    start,
    warm_up,
)
from dpq_rec.nn.collection import without_small
from dpq_rec.table import sizes
from tests.dpq_rec.nn.modules import keyed

DIM, LARGE = 32, 400
DPQ = DPQConfig(method="vq", num_subspaces=16, num_codes=32)  # 4,096 bytes of values
SAID = r"table {!r} stays plain: its codes and values would take 4,116 bytes, its 2 rows take 256"
BREAK_EVEN = {  # of vectors of 32: the most rows that stay plain
    "10 bytes of codes": (DPQ, 4096 / (128 - 10)),
    "shared values": (DPQConfig(num_subspaces=16, num_codes=32, share_subspaces=True), 256 / (128 - 10)),
    "fp16 values": (DPQConfig(num_subspaces=16, num_codes=32, values_dtype="float16"), 2048 / (128 - 10)),
    "levels": (DPQConfig(num_subspaces=16, num_codes=32, num_levels=3), 3 * 4096 / (128 - 30)),
    "a multiple": (DPQConfig(num_subspaces=32, num_codes=256), 32768 / (128 - 32)),
    "as many bytes": (DPQConfig(num_subspaces=32, num_codes=256, num_levels=2), 1024),
}


def collection(kind, *sizes_of_tables):
    """Configs of tables: t0, t1 and so on."""
    pooling = {"pooling": PoolingType.SUM} if kind is EmbeddingBagConfig else {}
    return [
        kind(name=f"t{at}", num_embeddings=rows, embedding_dim=DIM, feature_names=[f"f{at}"], **pooling)
        for at, rows in enumerate(sizes_of_tables)
    ]


@pytest.mark.parametrize(("config", "most_rows"), BREAK_EVEN.values(), ids=BREAK_EVEN.keys())
def test_table_is_quantized_from_the_row_on_that_makes_it_smaller(config, most_rows, tmp_path):
    """By the bytes of an artifact."""
    for num_rows in (int(most_rows), int(most_rows) + 1):
        stays = num_rows <= most_rows
        assert (config.why_plain(num_rows, DIM) is not None) == stays
        if num_rows < 2000:
            model = nn.ModuleDict({"t": DPQEmbedding(num_rows, DIM, config)})
            freeze(model, tmp_path / f"{num_rows}")
            found = sizes(EmbeddingStore.open(tmp_path / f"{num_rows}").tables.values())
            assert found["artifact_bytes"] == config.artifact_bytes(num_rows, DIM)
            assert (found["artifact_bytes"] >= found["full_bytes"]) == stays


def test_table_whose_rows_are_no_smaller_stays_plain_however_many_it_has():
    why = DPQConfig(num_subspaces=32, num_codes=256, num_levels=4).why_plain(1_000_000, DIM)
    assert why == "its codes and values would take 128,131,072 bytes, its 1,000,000 rows take 128,000,000"


def test_bytes_of_tiers_are_those_of_an_artifact(tmp_path):
    config = DPQConfig(num_subspaces=8, num_codes=16, num_levels=5, tiers=((0.1, 3), (0.7, 1)))
    freeze(nn.ModuleDict({"t": DPQEmbedding(300, DIM, config)}), tmp_path / "artifact")
    stored = sizes(EmbeddingStore.open(tmp_path / "artifact").tables.values())["artifact_bytes"]
    assert stored == config.artifact_bytes(300, DIM)


def every_kind(rows=2):
    """A small table of every kind beside a large one."""
    return nn.ModuleDict(
        {
            "bags": EmbeddingBagCollection(tables=collection(EmbeddingBagConfig, LARGE, rows)),
            "small": nn.Embedding(rows, DIM, padding_idx=0),
            "bag": nn.EmbeddingBag(rows, DIM, mode="sum"),
            "large": nn.Embedding(LARGE, DIM),
        }
    )


@pytest.mark.parametrize("config", [DPQ, dict.fromkeys(("t0", "t1", "small", "bag", "large"), DPQ)])
def test_replacing_leaves_small_tables_plain_says_so_once_and_freezes_all(config, tmp_path):
    model = every_kind()
    kept = [model["bags"].embedding_bags["t1"].weight, model["small"], model["bag"]]
    with pytest.warns(UserWarning, match="stays plain") as said:
        replace_embeddings(model, config)
    assert sorted(str(each.message).split("'")[1] for each in said) == ["bag", "small", "t1"]
    assert all(str(each.message).startswith(SAID.format(str(each.message).split("'")[1])) for each in said)
    assert kept == [model["bags"].plain["bags"].embedding_bags["t1"].weight, model["small"], model["bag"]]
    assert (type(model["large"]), list(model["bags"].quantizers)) == (DPQEmbedding, ["t0"])
    freeze(model, tmp_path / "artifact")
    tables = EmbeddingStore.open(tmp_path / "artifact").tables
    kinds = {name: table.manifest.kind for name, table in tables.items()}
    assert kinds == {"t0": "dpq", "t1": "dense", "small": "dense", "bag": "dense", "large": "dpq"}
    assert all(sizes([table])["compression_ratio"] >= 1 for table in tables.values())
    stored = EmbeddingStore.open(tmp_path / "artifact").lookup("small", np.arange(2)).vectors
    assert stored.tobytes() == model["small"].weight.detach().numpy().tobytes()


@pytest.mark.parametrize("kind", [DPQEmbeddingBagCollection, DPQEmbeddingCollection])
def test_collections_built_from_configs_hold_small_tables_plain(kind):
    config_kind = EmbeddingBagConfig if kind is DPQEmbeddingBagCollection else EmbeddingConfig
    with pytest.warns(UserWarning, match=SAID.format("t1")):
        module = kind(collection(config_kind, LARGE, 2), DPQ)
    assert list(module.quantizers) == ["t0"]
    out = module(keyed({"f0": [[3], [4]], "f1": [[1], [0]]}))
    weight = next(iter(module.plain.parameters()))
    small = out["f1"] if kind is DPQEmbeddingBagCollection else out["f1"].values()
    assert torch.equal(small, weight[[1, 0]])


@pytest.mark.parametrize("kind", [DPQEmbeddingBagCollection, DPQEmbeddingCollection])
def test_collection_of_small_tables_alone_is_a_plain_one_that_takes_what_others_take(kind, tmp_path):
    config_kind = EmbeddingBagConfig if kind is DPQEmbeddingBagCollection else EmbeddingConfig
    with pytest.warns(UserWarning, match="stays plain"):
        module = kind(collection(config_kind, 2, 3), DPQ)
    module(keyed({"f0": [[1]], "f1": [[2]]}))
    for each in (warm_up, start):
        each(nn.Sequential(module))
    freeze(nn.Sequential(module), tmp_path / "artifact")
    tables = EmbeddingStore.open(tmp_path / "artifact").tables
    assert {name: table.manifest.kind for name, table in tables.items()} == {"t0": "dense", "t1": "dense"}


def test_model_of_small_tables_alone_stays_as_it_was_and_takes_what_others_take(tmp_path):
    embedding = nn.Embedding(2, DIM)
    with pytest.warns(UserWarning, match=SAID.format("table")):
        assert replace_embeddings(embedding, DPQ, from_weights=True) is embedding
    for each in (warm_up, start):
        each(embedding)
    freeze(embedding, tmp_path / "artifact")
    assert EmbeddingStore.open(tmp_path / "artifact").table("table").manifest.kind == "dense"


def test_small_tables_are_quantized_where_that_is_asked_for():
    """By their config, or by building their module."""
    insisting = DPQConfig(method="vq", num_subspaces=16, num_codes=32, quantize_small=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = replace_embeddings(every_kind(), insisting)
        alone = DPQEmbedding(2, DIM, DPQ), DPQEmbeddingBag(2, DIM, DPQ)
        assert without_small({"t": insisting}, {"t": (2, DIM)}) == {"t": insisting}
    assert (type(model["small"]), type(model["bag"])) == (DPQEmbedding, DPQEmbeddingBag)
    assert list(model["bags"].quantizers) == ["t0", "t1"]
    assert all(len(module.quantizers) == 1 for module in alone)


def test_small_table_keeps_what_a_dpq_table_would_refuse():
    model = nn.ModuleDict({"small": nn.Embedding(2, DIM, max_norm=1.0), "large": nn.Embedding(LARGE, DIM)})
    with pytest.warns(UserWarning, match="stays plain"):
        replace_embeddings(model, DPQ)
    assert (type(model["small"]), type(model["large"])) == (nn.Embedding, DPQEmbedding)


def test_small_tied_table_stays_tied():
    model = nn.ModuleDict({"words": nn.Embedding(2, DIM), "over": nn.Linear(DIM, 2)})
    model["over"].weight = model["words"].weight
    with pytest.warns(UserWarning, match="stays plain"):
        replace_embeddings(model, DPQ)
    assert model["over"].weight is model["words"].weight
