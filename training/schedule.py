"""Schedules of a run: the warm-up and learning rates. In: model and optimizer, at an epoch or a step. Out: changed.

In the first `--full-epochs` epochs, the warm-up, vectors are the queries themselves: the tables learn as plain ones do.
Then keys and values are placed by k-means of the queries, and quantized training goes on with the same queries and the
same state of their optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from dpq_rec.nn import Quantizer, start, warm_up
from dpq_rec.nn.model import find_tables
from dpq_rec.nn.shards import shards_of
from training.config import RunConfig

_LEAST_LENGTH = 1e-12  # of a row: one of zeros stays as it is


def set_rates(optimizer: KeyedOptimizer, first_rates: Sequence[float], factor: float) -> None:
    """Set the learning rates of all groups to their first ones times a factor; before the step's `zero_grad`."""
    for group, first in zip(optimizer.param_groups, first_rates, strict=True):
        group["lr"] = first * factor


def begin_epoch(model: nn.Module, optimizer: KeyedOptimizer, config: RunConfig, epoch: int) -> None:
    """Bring a model to where an epoch begins; every rank calls it, with a model as the epoch before has left it."""
    full_epochs = config.full_epochs
    if not any(isinstance(module, Quantizer) for module in model.modules()):  # plain tables, or too small to quantize
        return
    if full_epochs:
        warm_up(model, enabled=epoch <= full_epochs)
    if epoch != full_epochs + 1:
        return
    if full_epochs and getattr(config.model, "similarity", None) == "cosine":
        to_unit_length(model, optimizer)
    if full_epochs or config.embedding.start == "kmeans":
        start(model, seed=config.run.seed)
    if full_epochs:
        reset_quantizer_state(model, optimizer)


@torch.no_grad()
def to_unit_length(model: nn.Module, optimizer: KeyedOptimizer) -> None:
    """Give every query of a table that is quantized the length one, which a cosine cannot see but k-means can.

    Cut to 1/n of its length, a row has a gradient n times as large. The squares that Adagrad has added up are
    multiplied by n^4: a step is then 1/n as long as it was too. Of other optimizers the state stays as it is.
    """
    states: dict[str, Any] = optimizer.state_dict()["state"]
    for name, table in find_tables(model).items():
        if table.quantizer is None:
            continue
        squares = [
            state[f"{name}.momentum1"]
            for weight, state in states.items()
            if weight.endswith(f".queries.{table.embedding_dim}.embeddings.{name}.weight")
            and f"{name}.momentum1" in state
        ]
        mine = [shard.tensor for shard in shards_of(table.weight_VQ) if shard.tensor is not None]
        for place, rows_NQ in enumerate(mine):
            lengths_N1 = rows_NQ.norm(dim=1, keepdim=True).clamp(min=_LEAST_LENGTH)
            rows_NQ.div_(lengths_N1)
            for square in squares:
                of_rows = square.local_shards()[place].tensor
                of_rows.mul_(lengths_N1.view(-1, *[1] * (of_rows.dim() - 1)) ** 4)


@torch.no_grad()
def reset_quantizer_state(model: nn.Module, optimizer: KeyedOptimizer) -> None:
    """Zero the optimizer's state of keys and values: after gradients of zero, Adam's first step would be too long."""
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    placed = {id(weight) for quantizer in quantizers for weight in quantizer.parameters()}
    for weight, state in optimizer.state.items():
        for tensor in state.values() if id(weight) in placed else ():
            tensor.zero_()
