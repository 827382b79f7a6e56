"""One rank against two, on gloo, with stock sharders; and fused optimizers against their formulas on one process."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dpq_rec import EmbeddingStore, verify

WORKER = Path(__file__).with_name("worker.py")
spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
sys.modules["distributed_worker"] = worker  # where dataclasses look for the module
spec.loader.exec_module(worker)
COMPARED = [name for name, case in worker.CASES.items() if case.config.revive_after is None]
FUSED = ["sx-row", "vq-row", "sx-table", "sx-column", "sx-ids-row", "vq-one-row"]  # all three optimizers


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Number of ranks -> the folder that the worker left."""
    folders = {}
    for world_size in (1, 2):
        folders[world_size] = tmp_path_factory.mktemp(f"ranks{world_size}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
        result = subprocess.run([*command, str(WORKER), str(folders[world_size])], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
    return folders


def results(runs, world_size):
    return json.loads((runs[world_size] / "results.json").read_text())


def losses(runs, world_size, case):
    return np.array(results(runs, world_size)["losses"][case])


@pytest.mark.parametrize("case", COMPARED)
def test_two_ranks_have_the_losses_and_penalties_of_one(runs, case):
    np.testing.assert_allclose(losses(runs, 2, case), losses(runs, 1, case), rtol=0, atol=1e-5)
    assert len(losses(runs, 1, case)) == worker.STEPS


@pytest.mark.parametrize("case", COMPARED)
def test_two_ranks_freeze_the_artifact_of_one(runs, case):
    stores = [EmbeddingStore.open(runs[world_size] / case) for world_size in (1, 2)]
    verify(runs[2] / case)
    for name, table in stores[0].tables.items():
        ids = np.arange(table.manifest.num_embeddings)
        one, two = (store.lookup(name, ids).vectors for store in stores)
        # Losses agree to rounding, so now and then a row lies so near between two codes that it falls to the other.
        assert (np.isclose(one, two, atol=1e-5).all(axis=1)).mean() > 0.95


def test_no_rank_holds_a_whole_table_that_was_built_on_meta(runs):
    whole = worker.BIG_ROWS * worker.BIG_DIM * 4
    assert 0.5 * whole <= results(runs, 2)["big_table_bytes"] < 0.95 * whole


def update(optimizer, weight, gradient, state):
    """SGD; Adagrad: state += g^2; row-wise Adagrad: state += mean of g^2 over the row; both divide by its root."""
    if optimizer is torch.optim.SGD:
        weight -= worker.LEARNING_RATE * gradient
        return
    square = gradient.square()
    state += square if optimizer is torch.optim.Adagrad else square.mean(1, keepdim=True)
    weight -= worker.LEARNING_RATE * gradient / (state.sqrt() + worker.EPSILON)


@pytest.mark.parametrize("name", FUSED)
def test_fused_optimizer_equals_its_formula_on_a_plain_module(runs, name):
    case = worker.CASES[name]
    torch.manual_seed(0)
    model = worker.Model(case)
    queries = model.tables.query_weights()
    parameters = {n: p for n, p in model.named_parameters() if ".queries." in n}
    states = {n: torch.zeros_like(p) for n, p in parameters.items()}
    assert len(queries) == len(parameters)
    others = [p for n, p in model.named_parameters() if ".queries." not in n and p.requires_grad]
    optimizer = torch.optim.SGD(others, lr=0.1)
    generator = torch.Generator().manual_seed(1)
    got = []
    for _ in range(worker.STEPS):
        loss = model(*worker.batch(generator, 0, 1))
        model.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for n, parameter in parameters.items():
                update(case.optimizer, parameter, parameter.grad, states[n])
        got.append(loss.item())
    np.testing.assert_allclose(losses(runs, 2, name)[:, 0], got, rtol=0, atol=1e-5)
