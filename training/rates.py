"""Learning rates, step by step. In: an optimizer, how its rates fall, a step. Out: the rates of its groups, set.

A rate is a function of the step alone: a run that goes on needs no state of it.
"""

from __future__ import annotations

from torchrec.optim.keyed import KeyedOptimizer

from training.config import OptimisationOptions


def falling_steps(options: OptimisationOptions, num_steps: int) -> range | None:
    """The steps in which the rates of a run of so many fall, by number; None where they stay."""
    if options.rate_decay == "none":
        return None
    return range(0 if options.rate_decay == "linear" else num_steps * 2 // 3, num_steps)


class Rates:
    """The learning rates of all groups of an optimizer, which may differ, and keep their proportions as they fall.

    Args:
        optimizer: at its first rates: made, not loaded yet.
        falls: steps in which the rates fall linearly to 0, by number; None where they stay.
    """

    def __init__(self, optimizer: KeyedOptimizer, falls: range | None) -> None:
        self.optimizer, self.falls = optimizer, falls
        self.firsts = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, num_done: int, rate: float | None = None) -> None:
        """Set the rates of the step after `num_done` steps; it has to be done before the step's `zero_grad`.

        Args:
            num_done: steps of the whole run before this one.
            rate: what all groups fall from; each one's first rate where it is None.
        """
        left = 1.0 if self.falls is None else min(1.0, (self.falls.stop - num_done) / len(self.falls))
        for group, first in zip(self.optimizer.param_groups, self.firsts, strict=True):
            group["lr"] = (first if rate is None else rate) * left
