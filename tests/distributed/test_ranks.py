"""One rank against two, on gloo, with stock sharders; and fused row-wise Adagrad against the formula on one process."""

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
spec.loader.exec_module(worker)
CASES = [f"{method}-{sharding}" for method, sharding in worker.CASES]


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


def losses(runs, world_size, case):
    return np.array(json.loads((runs[world_size] / "losses.json").read_text())[case])


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_losses_and_penalties_of_one(runs, case):
    np.testing.assert_allclose(losses(runs, 2, case), losses(runs, 1, case), rtol=0, atol=1e-5)
    assert losses(runs, 1, case).shape == (worker.STEPS, 3)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_freeze_the_artifact_of_one(runs, case):
    stores = [EmbeddingStore.open(runs[world_size] / case) for world_size in (1, 2)]
    verify(runs[2] / case)
    for name, size in worker.SIZES.items():
        one, two = (store.lookup(name, np.arange(size)).vectors for store in stores)
        # Losses agree to rounding, so now and then a row lies so near between two codes that it falls to the other.
        assert (np.isclose(one, two, atol=1e-5).all(axis=1)).mean() > 0.95


@pytest.mark.parametrize("method", ["sx", "vq"])
def test_fused_rowwise_adagrad_equals_its_formula(runs, method):
    """state += mean(g^2) over the row; weight -= lr * g / (sqrt(state) + eps); on a plain module, no sharding."""
    torch.manual_seed(0)
    model = worker.Model(method)
    queries = {name: model.tables.queries["16"].embeddings[name].weight for name in worker.SIZES}
    states = {name: torch.zeros(len(weight), 1) for name, weight in queries.items()}
    others = [p for name, p in model.named_parameters() if ".queries." not in name]
    optimizer = torch.optim.SGD(others, lr=0.1)
    generator = torch.Generator().manual_seed(1)
    got = []
    for _ in range(worker.STEPS):
        loss = model(*worker.batch(generator, 0, 1))
        model.zero_grad()
        loss.backward()
        optimizer.step()
        for name, weight in queries.items():
            states[name] += weight.grad.square().mean(1, keepdim=True)
            weight.data -= worker.LEARNING_RATE * weight.grad / (states[name].sqrt() + worker.EPSILON)
        got.append(loss.item())
    np.testing.assert_allclose(losses(runs, 2, f"{method}-row_wise")[:, 0], got, rtol=0, atol=1e-5)
