"""A phase without quantizing. In: a model, sharded or not. Out: its DPQ tables handing out queries as vectors, or not.

The modules, their shards and the state of fused optimizers stay as they are, so that what is learned before quantizing
goes on in it: `start` then places keys and values by the queries.
"""

from __future__ import annotations

from torch import nn

from dpq_rec.errors import ConfigError
from dpq_rec.nn.find import quantized_tables


def warm_up(model: nn.Module, *, enabled: bool = True) -> None:
    """Let every DPQ table of a model hand out queries themselves, in training and in eval mode, or quantize again.

    In its warm-up a table trains as a plain one of its queries would. Keys and values get gradients of zero, so that
    DistributedDataParallel finds all its parameters. A model in its warm-up cannot be frozen. No state_dict holds
    the switch: whoever goes on from a checkpoint sets it again.

    Args:
        model: plain, or wrapped in DistributedModelParallel or DistributedDataParallel.
        enabled: False quantizes again.

    Raises:
        ConfigError: the model holds no DPQ module, or a table whose queries are not as wide as its vectors.
    """
    found = quantized_tables(model, "warm_up")
    for name, table in found.items():
        assert table.quantizer is not None, "the others were left out"
        if enabled and table.quantizer.query_dim != table.embedding_dim:
            got = f"queries of width {table.quantizer.query_dim} and vectors of {table.embedding_dim}"
            raise ConfigError(f"table {name!r}: got {got}, of which no one is the other; leave out key_dim")
    for table in found.values():
        assert table.quantizer is not None, "the others were left out"
        table.quantizer.is_warming_up = enabled
