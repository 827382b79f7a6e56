"""Fused Adam, which FBGEMM has for CUDA alone, against torch's."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from dpq_rec import DPQConfig
from dpq_rec.nn import DPQEmbeddingBagCollection

ROWS, STEPS = 20, 5
OPTIONS = {"lr": 0.05, "eps": 1e-8}


def losses_of(module, model, device):
    """Every step touches every row: rows that it did not touch would move under torch's Adam alone."""
    features = KeyedJaggedTensor(keys=["a"], values=torch.arange(ROWS), lengths=torch.ones(ROWS, dtype=torch.long))
    dense = torch.optim.SGD(module.quantizers.parameters(), lr=0.1)
    for _ in range(STEPS):
        loss = (model(features.to(device)).values() - 1).square().mean()
        dense.zero_grad()
        loss.backward()
        dense.step()
        yield loss.item()


def build(device):
    torch.manual_seed(0)
    tables = [EmbeddingBagConfig(name="a", num_embeddings=ROWS, embedding_dim=16, feature_names=["a"])]
    return DPQEmbeddingBagCollection(tables, DPQConfig(num_subspaces=4, num_codes=8), device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: FBGEMM has fused Adam for CUDA alone")
def test_fused_adam_equals_torchs():
    device = torch.device("cuda", 0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, sharded = build(device), build(device)
        _apply_optimizer_in_backward(torch.optim.Adam, sharded.queries.parameters(), dict(OPTIONS))
        wrapped = DistributedModelParallel(sharded, device=device)
        for shard in sharded.query_weights()["a"].local_shards():
            shard.tensor.copy_(plain.query_weights()["a"])
        sharded.quantizers.load_state_dict(plain.quantizers.state_dict())
        got = list(losses_of(sharded, wrapped, device))
        adam = torch.optim.Adam(plain.queries.parameters(), **OPTIONS)
        want = []
        for loss in losses_of(plain, plain, device):
            adam.step()
            adam.zero_grad()
            want.append(loss)
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=0, atol=1e-4)
    finally:
        dist.destroy_process_group()
