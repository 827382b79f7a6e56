"""Activation checkpointing: forwards that run twice. In: a forward's rows. Out: the keys and values of its first run.

Checkpointing runs a forward again in the backward pass, for what it did not save. Statistics, EMA and revival must move
once, and the second run must find the keys and values of the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpq_rec.errors import ConfigError

Codebook = tuple[torch.Tensor, torch.Tensor]  # a level's values_DKS and keys_DKX; D subspaces, which may share both
_MOST_KEPT = 32  # first runs; one that no second follows, as under no_grad in training mode, is dropped in time


def recomputing() -> bool:
    """Whether this is a second run: a forward inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


class FirstRun:
    """Keys and values of a forward, level by level, kept for a second run of it.

    Args:
        like: tensors that a second run has too, with the same contents.
    """

    def __init__(self, like: tuple[torch.Tensor, ...]) -> None:
        self.like, self.codebooks, self.is_found = like, list[Codebook](), False

    def codebook(self, level: int, now: Codebook) -> Codebook:
        """The level's codebook: in a second run that of the first, with gradients that go to the one there is now."""
        if not recomputing():
            self.codebooks.append((now[0].detach(), now[1].detach()))
            return now
        first = zip(self.codebooks[level], now, strict=True)
        values_DKS, keys_DKX = (contents + (tensor - tensor.detach()) for contents, tensor in first)  # adds zeros
        return values_DKS, keys_DKX

    def fixed(self, now: torch.Tensor) -> torch.Tensor:
        """What has no gradients; in a second run that of the first."""
        return self.codebook(0, (now, now))[0]


class FirstRuns:
    """The first runs of a module whose second may still come. A copy of it, or a pickle, is empty."""

    def __init__(self) -> None:
        self._kept: list[FirstRun] = []
        self._any_dropped = False

    def __reduce__(self) -> Any:
        return FirstRuns, ()

    def of(self, quantizer: nn.Module, *like: torch.Tensor) -> FirstRun | None:
        """This run, to be filled; in a second run the first. None where there will be no second, or was no first.

        Raises:
            ConfigError: FSDP holds the keys and values, and would lose what is written into them; or a second run comes
                so late that its first was dropped.
        """
        if getattr(quantizer, "_is_fsdp_managed_module", False):
            raise ConfigError(
                "config: got ema_decay or revive_after under FSDP, which drops what moves without gradients; train it "
                "under DistributedModelParallel or DistributedDataParallel, or leave both out"
            )
        return self.unchecked(*like)

    def unchecked(self, *like: torch.Tensor) -> FirstRun | None:
        """The same, of a module that FSDP may hold."""
        if recomputing():
            return self._find(like)
        self._kept = [run for run in self._kept if not run.is_found]
        # A second run follows where the graph of this one is not kept, or its tensors are packed by hooks.
        if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            return None
        self._any_dropped |= len(self._kept) == _MOST_KEPT
        self._kept = [*self._kept[1 - _MOST_KEPT :], FirstRun(like)]
        return self._kept[-1]

    def _find(self, like: tuple[torch.Tensor, ...]) -> FirstRun | None:
        """The last one of these contents that was not found yet: backward passes go from the last to the first."""
        same = [run for run in self._kept if all(map(torch.equal, run.like, like))]
        run = next((run for run in reversed(same) if not run.is_found), same[-1] if same else None)
        if run is not None:
            run.is_found = True
        elif self._any_dropped:
            raise ConfigError(
                f"forward: got one to run again of which {_MOST_KEPT} others have run since, with ema_decay, "
                "revive_after or a kept padding row; call backward more often, or leave checkpointing out"
            )
        return run
