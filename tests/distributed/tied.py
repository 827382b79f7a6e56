"""Tied models, trained on ranks. In: a case. Out: losses and weights, and what must be the same on every rank.

Under DistributedDataParallel every rank holds the model whole, under DistributedModelParallel a part of the queries.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel

from dpq_rec import DPQConfig, EmbeddingStore
from dpq_rec.nn import freeze, replace_embeddings
from dpq_rec.nn.shards import rows_of, shards_of
from tests.distributed import checks
from tests.dpq_rec.nn.language_models import MODELS, WORDS, loss_of, words

RATE, NUM_STEPS = 0.1, 4


class TiedCase(NamedTuple):
    """A model of transformers, how its table is quantized, and whether its queries are sharded."""

    model: str
    config: DPQConfig
    sharded: bool = False


SX = DPQConfig(num_subspaces=8, num_codes=8)
VQ = DPQConfig(method="vq", num_subspaces=8, num_codes=8, num_levels=2, value_gradient=True, commitment_weight=0.25)
EMA = DPQConfig(method="vq", num_subspaces=8, num_codes=8, ema_decay=0.9)
TIED = {
    "tied-bert-sx": TiedCase("bert", SX),
    "tied-gpt2-vq": TiedCase("gpt2", VQ),
    "tied-t5-ema": TiedCase("t5", EMA),
    "tied-gpt2-sx-sharded": TiedCase("gpt2", SX, sharded=True),
    "tied-gpt2-ema-sharded": TiedCase("gpt2", EMA, sharded=True),
}


def train(case, out):
    """Some steps of SGD on each rank's share of a batch, then freeze."""
    model = replace_embeddings(MODELS[case.model].make(), case.config, tables=[MODELS[case.model].table])
    wrapped = _distributed(model, case)
    unfused = [p for name, p in wrapped.named_parameters() if not (case.sharded and ".queries." in name)]
    optimizer, losses, rank, world_size = torch.optim.SGD(unfused, RATE), [], dist.get_rank(), dist.get_world_size()
    for step in range(NUM_STEPS):
        loss = loss_of(wrapped.train(), words(step).chunk(world_size)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world_size)
    freeze(wrapped, out, version="of-a-test")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".queries." not in name}
    (queries,) = model.get_input_embeddings().query_weights().values()
    weights["queries"] = rows_of(queries, torch.arange(WORDS))
    if dist.get_rank() == 0:
        torch.save(weights, out.with_suffix(".pt"))
    served = checks.of_all_ranks(_has_the_bits_of(model.eval(), MODELS[case.model].table, out))
    return {"losses": losses, "served": served}


def _distributed(model, case):
    """With the weights that the model has; the sharder starts tables with others."""
    if not case.sharded:
        return DistributedDataParallel(model, broadcast_buffers=False) if dist.get_world_size() > 1 else model
    table = model.get_input_embeddings()
    (before,) = (weight.clone() for weight in table.query_weights().values())
    apply_optimizer_in_backward(torch.optim.SGD, table.queries.parameters(), {"lr": RATE})
    wrapped = DistributedModelParallel(model, device=torch.device("cpu"))
    (sharded,) = table.query_weights().values()
    for shard in shards_of(sharded):
        if shard.tensor is not None:
            shard.tensor.copy_(before.narrow(0, shard.first_row, shard.num_rows))
    return wrapped


def _has_the_bits_of(model, table, path):
    """Whether the decoded weight, read by every rank, is what the artifact holds."""
    with torch.no_grad():
        weight_VE = model.get_output_embeddings().weight
    return EmbeddingStore.open(path).lookup(table, np.arange(WORDS)).vectors.tobytes() == weight_VE.numpy().tobytes()
