"""Tables that are trained small: vectors held to dense tables written out, gradients to all parts, bytes to files."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch.nn import functional
from torchrec import KeyedJaggedTensor

from dpq_rec import EmbeddingStore
from tests.benchmarks.quality.baselines import METHODS, ComposedTables, composed_task, sizes_of, stored_tables
from tests.benchmarks.quality.compositions import Hashing, LowDim, QuotientRemainder, TensorTrain
from training.config import EmbeddingOptions
from training.data.synthetic import SyntheticConfig, generate
from training.distributed import process_group, shard
from training.models.interactions import bag_configs
from training.recipes import RECIPES, with_changes
from training.recipes.interactions import TableOptimisation
from training.trainer import train

CPU = torch.device("cpu")
SHAPES = {"user_id": (70, 16), "item_id": (50, 16), "tags": (2, 16)}
FEATURES = {"user_id": ["user_id"], "item_id": ["item_id", "negative_item_id"], "tags": ["tags"]}
SIZES = {"low-dim": LowDim(3), "hashing": Hashing(13), "qr": QuotientRemainder(9), "tensor-train": TensorTrain(4, 3)}
CASES = {**SIZES, "mixed hashing": Hashing(13, "mixed"), "two cores": TensorTrain(5, 2)}


def small_tables(size):
    """The module of a model whose user_id and item_id are of a size, and tags plain."""
    options = EmbeddingOptions(kind="full", dpq=None, embedding_dim=16)
    configs = bag_configs(FEATURES, {name: shape[0] for name, shape in SHAPES.items()}, options)
    return ComposedTables(configs, {"user_id": size, "item_id": size, "tags": None}, CPU)


def batch():
    """Bags of several values, an empty one, the last rows, and the same row twice."""
    lengths = {"user_id": [1, 1, 1], "item_id": [1, 1, 1], "negative_item_id": [1, 1, 0], "tags": [2, 0, 1]}
    rows = {"user_id": [0, 69, 7], "item_id": [49, 4, 4], "negative_item_id": [4, 30], "tags": [0, 1, 1]}
    return KeyedJaggedTensor(
        keys=list(rows),
        values=torch.tensor([row for each in rows.values() for row in each]),
        lengths=torch.tensor([n for each in lengths.values() for n in each]),
    )


def parts_of(model):
    """Part -> its table, as the module holds it."""
    return {
        name.rsplit(".", 2)[-2]: value.local_shards()[0].tensor.detach()
        for name, value in model.state_dict().items()
        if hasattr(value, "local_shards")
    }


def dense_tables(model, weights=None):
    """Every table [V, E] in fp32, by formulas of this test's own."""
    module = next(m for m in model.modules() if isinstance(m, ComposedTables))
    weights = parts_of(model) if weights is None else weights
    found = {"tags": weights["tags"]}
    for table in ("user_id", "item_id"):
        num_rows, composition = SHAPES[table][0], module.composition(table)
        if "narrow" in composition.parts:
            narrow = weights[f"{table}-narrow"][:, : len(composition.projection_RE)]
            found[table] = torch.einsum("vr,re->ve", narrow, composition.projection_RE)
        elif "shared" in composition.parts:
            at = [hashed(row, composition.size) for row in range(num_rows)]
            found[table] = torch.stack([weights[f"{table}-shared"][row] for row in at])
        elif "quotient" in composition.parts:
            quotients, remainders = weights[f"{table}-quotient"], weights[f"{table}-remainder"]
            found[table] = torch.stack([quotients[row // 9] * remainders[row % 9] for row in range(num_rows)])
        else:
            found[table] = train_matrix(list(composition.matrix.factors))[:num_rows]
    return found


def hashed(row, size):
    mixed = row if size.hash == "remainder" else (row * 0x9E3779B97F4A7C15 % 2**64) >> 32
    if size.hash == "mixed" and mixed >= 2**31:
        mixed -= 2**32  # the shift keeps the sign
    return mixed % size.num_rows


def train_matrix(cores):
    """Entry (v, e) of a block tensor train: the product of each core's matrix for the digits of v and of e."""
    row_factors, column_factors = zip(*(core.shape[1:3] for core in cores), strict=True)
    rows = []
    for v in range(math.prod(row_factors)):
        entries = []
        for e in range(math.prod(column_factors)):
            digits = zip(np.unravel_index(v, row_factors), np.unravel_index(e, column_factors), strict=True)
            product = torch.eye(1)
            for core, (i, j) in zip(cores, digits, strict=True):
                product = product @ core[:, i, j, :]
            entries.append(product[0, 0])
        rows.append(torch.stack(entries))
    return torch.stack(rows)


@pytest.fixture(params=CASES)
def sharded(request):
    """A model under the trainer's own sharding, on one rank."""
    torch.manual_seed(0)
    with process_group(CPU):
        model, optimizer = shard(small_tables(CASES[request.param]), TableOptimisation(optimizer="sgd"), CPU)
        yield model, optimizer


def test_pooled_vectors_are_those_of_the_dense_tables(sharded):
    model, _ = sharded
    pooled, dense = model(batch()), dense_tables(model)
    for table, features in FEATURES.items():
        mode = "mean" if table == "tags" else "sum"
        for feature in features:
            bag = batch()[feature]
            expected = functional.embedding_bag(
                bag.values(), dense[table], bag.offsets(), mode=mode, include_last_offset=True
            )
            torch.testing.assert_close(pooled[feature], expected)


def test_step_moves_parts_by_the_gradient_of_the_dense_tables(sharded):
    model, optimizer = sharded
    weights = {name: tensor.clone().requires_grad_() for name, tensor in parts_of(model).items()}
    own = {name: parameter for name, parameter in model.named_parameters() if "compositions" in name}
    wanted = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))

    def loss(pooled):
        return sum((pooled[feature] - wanted).square().mean() for each in FEATURES.values() for feature in each)

    expected = dict.fromkeys(FEATURES["item_id"])
    for table, features in FEATURES.items():
        mode = "mean" if table == "tags" else "sum"
        for feature in features:
            bag, dense = batch()[feature], dense_tables(model, weights)[table]
            expected[feature] = functional.embedding_bag(
                bag.values(), dense, bag.offsets(), mode=mode, include_last_offset=True
            )
    gradients = torch.autograd.grad(loss(expected), [*weights.values(), *own.values()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    optimizer.zero_grad()
    loss(model(batch())).backward()  # tables of parts take their step of SGD here
    for (name, after), before, gradient in zip(parts_of(model).items(), weights.values(), gradients, strict=False):
        torch.testing.assert_close(before - after, 0.1 * gradient, rtol=1e-4, atol=1e-6, msg=name)
    for parameter, gradient in zip(own.values(), gradients[len(weights) :], strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_stored_vectors_are_the_dense_tables_in_half_precision(sharded):
    model, _ = sharded
    stored, dense = stored_tables(model), dense_tables(model)
    for table in SHAPES:
        np.testing.assert_allclose(stored[table].vectors_VE, dense[table].detach().numpy(), rtol=0.01, atol=3e-3)
    assert set(stored["tags"].tensors) == {"vectors"}
    exact = {name: array for name, array in stored["user_id"].tensors.items() if array.dtype != np.float16}
    assert not exact


def test_bytes_are_those_of_the_serialized_tensors(sharded, request):
    model, _ = sharded
    size = CASES[request.node.callspec.params["sharded"]]
    for table, stored in stored_tables(model).items():
        serialized = save({name: np.ascontiguousarray(tensor) for name, tensor in stored.tensors.items()})
        on_disk = len(serialized) - 8 - int.from_bytes(serialized[:8], "little")
        assert stored.num_bytes == on_disk
        assert on_disk == (128 if table == "tags" else size.num_bytes(*SHAPES[table]))


@pytest.mark.parametrize(("num_embeddings", "order"), [(40979, 3), (29858, 2), (7, 3), (64, 3), (1, 2)])
def test_tensor_train_has_a_row_for_every_id_and_few_more(num_embeddings, order):
    factors = TensorTrain(2, order).row_factors(num_embeddings)
    assert len(factors) == order
    assert num_embeddings <= math.prod(factors) <= 1.25 * num_embeddings + 8
    assert math.prod(TensorTrain(2, order).column_factors(64)) == 64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [5, 20])
def test_sizes_fill_the_budget_and_stay_within_it(method, ratio):
    shapes = {"user_id": (6040, 64), "item_id": (3416, 64), "gender": (2, 64)}
    sizes = sizes_of(method, {}, ratio, shapes)
    plain = {name: 4 * v * e for name, (v, e) in shapes.items()}
    taken = sum(plain[n] if size is None else size.num_bytes(*shapes[n]) for n, size in sizes.items())
    assert 0.8 * sum(plain.values()) / ratio < taken <= sum(plain.values()) / ratio


@pytest.mark.parametrize("method", METHODS)
def test_trainer_leaves_an_artifact_of_every_vector(method, tmp_path):
    data = generate(SyntheticConfig(num_users=300, num_items=100, num_interactions=8000), tmp_path / "data")
    changes = {"embedding": "full", "embedding-dim": 16, "batch-size": 256, "num-negatives": 64, "epochs": 1}
    config = with_changes(RECIPES["two-tower"](str(data), str(tmp_path / "run")).as_dict(), changes)
    found = train(config, composed_task("two-tower", method, {}, 4))
    assert found["metrics"]["recall@20"] > 0
    item = EmbeddingStore.open(tmp_path / "run" / "artifact").table("item_id")
    assert item.tensors["vectors"].shape == (found["tables"]["item_id"]["num_embeddings"], 16)
    rows = item.tensors["vectors"]
    assert np.linalg.matrix_rank(rows - rows.mean(0)) > 1
    if method == "low-dim":
        assert np.linalg.matrix_rank(rows, tol=1e-4) == sizes_of(method, {}, 4, shapes_of(found))["item_id"].rank
    if method == "hashing":
        assert len(np.unique(rows, axis=0)) == sizes_of(method, {}, 4, shapes_of(found))["item_id"].num_rows
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["embedding"] == "full"


def shapes_of(found):
    return {name: (table["num_embeddings"], table["embedding_dim"]) for name, table in found["tables"].items()}
