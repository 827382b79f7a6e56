"""Sums over ranks. In: a tensor of this rank. Out: the sum over all ranks, through which gradients flow back to each.

Without a process group a sum over ranks is the tensor itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Ranks that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks; its gradient on a rank is the sum of the gradients that all ranks ask for."""
    return _SumOverRanks.apply(tensor) if world_size() > 1 else tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
