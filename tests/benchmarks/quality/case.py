"""One case of the grid. Out: its name, its folder, and what tells it from every other."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

Stage = Literal["trial", "final", "same-codes", "sweep", "ablation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A run, or a run's tables compressed after training.

    Attributes:
        dataset: folder in the folder of data sets.
        recipe: of the trainer.
        method: "full", "dpq-sx", "dpq-vq", or one of `baselines.METHODS` or `post_training.METHODS`.
        stage: "trial", by which settings are chosen; "final"; "same-codes", with K, D and L of a final DPQ; "sweep",
            over K and D; "ablation", a trial with one thing changed.
        ratio: total fp32 bytes to total bytes, at least; None where the method has one size only.
        seed: of everything random.
        epochs: at most.
        flags: of `python -m training`, besides those of the recipe.
        settings: of the method itself.
        of: name of the full run that is compressed; "" where the case is trained.
    """

    dataset: str
    recipe: str
    method: str
    stage: Stage
    ratio: float | None = None
    seed: int = 0
    epochs: int = 1
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    of: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Case:
        """The case that `as_dict` gave."""
        return cls(**content)

    @functools.cached_property
    def name(self) -> str:
        """dataset/method/stage-ratio-seed-digest: one for each case, also as a path."""
        digest = hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:8]
        ratio = "" if self.ratio is None else f"{self.ratio:g}x-"
        return f"{self.dataset}/{self.method}/{self.stage}-{ratio}seed{self.seed}-{digest}"
