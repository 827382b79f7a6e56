"""Learning rates, step by step. In: an optimizer, a schedule, a step. Out: the rates of the optimizer's groups, set.

A rate is a function of the step alone: a run that goes on needs no state of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchrec.optim.keyed import KeyedOptimizer

from training.config import OptimisationOptions, RunConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What all rates of a run are multiplied by.

    Attributes:
        falls: steps in which they fall linearly to 0, by number; empty where they stay.
        full_steps: steps of the full epochs, and
        quantized_rate: what comes after them is multiplied by this too.
    """

    falls: range = range(0)
    full_steps: int = 0
    quantized_rate: float = 1.0

    @classmethod
    def of(cls, config: RunConfig, steps_per_epoch: int) -> Schedule:
        """As the options say; rates stay in recipes that have no such options."""
        options = config.optimisation
        if not isinstance(options, OptimisationOptions):
            return cls()
        num_steps = options.epochs * steps_per_epoch
        firsts = {"none": num_steps, "late": num_steps * 2 // 3, "linear": 0}
        return cls(
            falls=range(firsts[options.rate_decay], num_steps),
            full_steps=config.full_epochs * steps_per_epoch,
            quantized_rate=options.quantized_rate if config.full_epochs else 1.0,
        )

    def factor(self, num_done: int) -> float:
        """Of the step after so many."""
        left = min(1.0, (self.falls.stop - num_done) / len(self.falls)) if self.falls else 1.0
        return left if num_done < self.full_steps else left * self.quantized_rate


class Rates:
    """The learning rates of all groups of an optimizer, which may differ, and keep their proportions.

    Args:
        optimizer: at its first rates: made, not loaded yet.
        schedule: of the run.
    """

    def __init__(self, optimizer: KeyedOptimizer, schedule: Schedule) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.firsts = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, num_done: int, rate: float | None = None) -> None:
        """Set the rates of the step after `num_done` steps; it has to be done before the step's `zero_grad`.

        Args:
            num_done: steps of the whole run before this one.
            rate: the first rate of all groups; None leaves each its own.
        """
        factor = self.schedule.factor(num_done)
        for group, first in zip(self.optimizer.param_groups, self.firsts, strict=True):
            group["lr"] = (first if rate is None else rate) * factor
