"""The order of the grid. In: what is known of finished cases. Out: the cases that are determined by now.

Trials come first; what they choose makes the final cases; these choose what gets more seeds. Every choice is made by
`Known`, which holds validation metrics and bytes: test metrics do not come this far.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tests.benchmarks.quality import baselines, grid, post_training
from tests.benchmarks.quality.case import Case
from tests.benchmarks.quality.grid import METHODS, STUDIES, Method, Study, Trial
from tests.benchmarks.quality.sizes import fits


class Known(NamedTuple):
    """A finished case, as choices see it.

    Attributes:
        case: which.
        validation: metrics on the validation split, of the epoch that it chose.
        num_bytes: of all tables as they lie on disk.
        full_bytes: of the fp32 tables.
    """

    case: Case
    validation: Mapping[str, float]
    num_bytes: int
    full_bytes: int

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Known:
        """What may be known of a line of results."""
        return cls(Case.from_dict(line["case"]), line["validation"], line["bytes"], line["full_bytes"])

    @property
    def is_within_budget(self) -> bool:
        """Whether it is as small as it was to be."""
        return self.case.ratio is None or self.num_bytes * self.case.ratio <= self.full_bytes


def best(known: Iterable[Known], metric: str) -> Known | None:
    """The one with the largest validation metric; the first of equals; None of none."""
    return max(known, key=lambda each: each.validation[metric], default=None)


def plan(lines: Sequence[Mapping[str, Any]], studies: Sequence[Study] = STUDIES) -> list[Case]:
    """All cases that are determined, finished ones too, in the order to run them."""
    found = {known.case.name: known for known in map(Known.of, lines)}
    cases = (case for study in studies for case in _Planner(study, found).cases())
    return list({case.name: case for case in cases}.values())


@functools.cache
def _fits(dataset: str, method: str, settings: str, ratio: float) -> bool:
    """Whether a baseline has a size that keeps to the ratio."""
    factories: Mapping[str, Any] = {"trained": baselines.METHODS, "post-training": post_training.METHODS}
    study = next(study for study in STUDIES if study.dataset == dataset)
    shapes = {str(number): (rows, study.flags["embedding-dim"]) for number, rows in enumerate(study.rows)}
    return fits(shapes, ratio, factories[METHODS[method].kind][method](**json.loads(settings)))


class _Planner:
    """The cases of one study."""

    def __init__(self, study: Study, found: Mapping[str, Known]) -> None:
        self.study, self.found = study, found

    def cases(self) -> Iterator[Case]:
        for name, method in METHODS.items():
            yield from self._trials(name, method)
            yield from self._finals(name, method, grid.SEEDS[0])
        for name in self._worth_more_seeds():
            for seed in grid.SEEDS[1:]:
                yield from self._finals(name, METHODS[name], seed)
        yield from self._same_codes()
        if self.study.dataset in grid.ABLATION_DATASETS:
            yield from self._ablations()
        if self.study.dataset in grid.SWEEP_DATASETS:
            yield from self._sweep()

    def _case(self, **fields: Any) -> Case:
        flags = {**self.study.flags, **fields.pop("flags", {})}
        return Case(dataset=self.study.dataset, recipe=self.study.recipe, flags=flags, **fields)

    def _ratios(self, method: Method) -> tuple[float | None, ...]:
        if not method.has_sizes or method.kind == "full":
            return (None,)
        more = self.study.more_ratios if method.kind == "post-training" else ()
        return tuple(sorted((*self.study.ratios, *more)))

    def _trials(self, name: str, method: Method) -> Iterator[Case]:
        """None where nothing is to be chosen, or another study chooses. Compressing is cheap: tuned at every ratio."""
        if len(method.trials) > 1 and not self._tuned_elsewhere(method):
            ratios = self._ratios(method)
            tuned = ratios if method.kind in ("post-training", "full") else (grid.TUNING_RATIO,)
            for ratio, trial in itertools.product(tuned, method.trials):
                yield from self._as_case(name, method, trial, ratio, stage="trial", seed=grid.SEEDS[0])

    def _as_case(
        self, name: str, method: Method, trial: Trial, ratio: float | None, *, stage: str, seed: int
    ) -> Iterator[Case]:
        """One case; none while the full run that it compresses is not finished, or where no size keeps to the ratio."""
        if ratio is not None and not self._has_size(name, trial, ratio):
            return
        fields: dict[str, Any] = {"method": name, "stage": stage, "ratio": ratio, "seed": seed}
        if method.kind == "post-training":
            full = self._full(seed)
            if full is not None:
                yield Case(
                    dataset=self.study.dataset,
                    recipe=self.study.recipe,
                    settings=trial.settings,
                    of=full.case.name,
                    **fields,
                )
            return
        size = trial.sizes[self.study.dataset][ratio] if method.kind == "dpq" and ratio is not None else {}
        epochs = self.study.epochs if stage == "final" else max(1, self.study.epochs // 2)
        yield self._case(epochs=epochs, flags={**self._flags(trial, epochs), **size}, settings=trial.settings, **fields)

    def _has_size(self, name: str, trial: Trial, ratio: float) -> bool:
        if METHODS[name].kind == "dpq":
            return ratio in trial.sizes.get(self.study.dataset, {})
        return _fits(self.study.dataset, name, json.dumps(trial.settings), ratio)

    def _flags(self, trial: Trial, epochs: int) -> dict[str, Any]:
        flags = {flag: float(f"{self.study.flags[flag] * factor:.6g}") for flag, factor in trial.times.items()}
        if trial.has_full_phase:
            flags |= {"full-epochs": max(1, round(self.study.full_share * epochs)), **self.study.full_phase}
        return {**flags, **trial.flags}

    def _full(self, seed: int) -> Known | None:
        finals = self._of("full", "final")
        return next((known for known in finals if known.case.seed == seed), None)

    def _of(self, method: str, stage: str, ratio: float | None = None) -> list[Known]:
        """Finished cases of this study within their budget, in the order of the plan."""
        return [
            known
            for known in self.found.values()
            if known.case.dataset == self.study.dataset
            and (known.case.method, known.case.stage, known.case.ratio) == (method, stage, ratio)
            and known.is_within_budget
        ]

    def _chosen(self, name: str, method: Method, ratio: float | None) -> Trial | None:
        """The trial with the best validation metric; None while some are not finished."""
        if len(method.trials) == 1:
            return method.trials[0]
        if self._tuned_elsewhere(method):
            other = next(study for study in STUDIES if study.dataset == self.study.tuned_on)
            return _Planner(other, self.found)._chosen(name, method, ratio)
        tuned = ratio if method.kind in ("post-training", "full") else grid.TUNING_RATIO
        tried: list[tuple[Trial, Known]] = []
        for trial in method.trials:
            for case in self._as_case(name, method, trial, tuned, stage="trial", seed=grid.SEEDS[0]):
                known = self.found.get(case.name)
                if known is None:
                    return None
                if known.is_within_budget:
                    tried.append((trial, known))
        winner = best([known for _, known in tried], self.study.metric)
        return next((trial for trial, known in tried if known is winner), None)

    def _tuned_elsewhere(self, method: Method) -> bool:
        return bool(self.study.tuned_on) and method.kind != "post-training"

    def _finals(self, name: str, method: Method, seed: int) -> Iterator[Case]:
        for ratio in self._ratios(method):
            trial = self._chosen(name, method, ratio)
            if trial is not None:
                yield from self._as_case(name, method, trial, ratio, stage="final", seed=seed)

    def _worth_more_seeds(self) -> list[str]:
        """Full, the best DPQ and the two best baselines at TUNING_RATIO; full alone while some are not finished."""
        ratio, worth = grid.TUNING_RATIO, ["full"]
        finals = {
            name: self._final_of_seed_0(name, ratio)
            for name, method in METHODS.items()
            if ratio in self._ratios(method) and any(self._has_size(name, trial, ratio) for trial in method.trials)
        }
        for kinds, count in ((("dpq",), 1), (("trained", "post-training"), grid.NUM_BEST_BASELINES)):
            names = [name for name in finals if METHODS[name].kind in kinds]
            known = [final for name in names if (final := finals[name]) is not None]
            if len(known) < len(names):
                continue
            known.sort(key=lambda each: -each.validation[self.study.metric])
            worth += [each.case.method for each in known[:count]]
        return worth

    def _final_of_seed_0(self, name: str, ratio: float) -> Known | None:
        finals = self._of(name, "final", ratio)
        return next((known for known in finals if known.case.seed == grid.SEEDS[0]), None)

    def _same_codes(self) -> Iterator[Case]:
        """K, D and L of every final DPQ, fitted to the trained full table: by faiss, and by DPQ (paper, G.3)."""
        full = self._full(grid.SEEDS[0])
        if full is None:
            return
        names = [name for name, method in METHODS.items() if method.kind == "dpq"]
        for name, ratio in itertools.product(names, self.study.ratios):
            final = self._final_of_seed_0(name, ratio)
            if final is None or "num-codes" not in final.case.flags:
                continue
            flags = final.case.flags
            size = {flag.replace("-", "_"): flags[flag] for flag in ("num-subspaces", "num-codes", "num-levels")}
            fields: dict[str, Any] = {"dataset": self.study.dataset, "recipe": self.study.recipe, "of": full.case.name}
            fitted = "pq" if size["num_levels"] == 1 else "rq"
            yield Case(method=fitted, stage="same-codes", settings=size, **fields)
            for settings in grid.RECONSTRUCTIONS:
                config = {**size, **settings, "method": name.removeprefix("dpq-"), "values_dtype": "float16"}
                yield Case(method="dpq-reconstruction", stage="same-codes", settings=config, **fields)

    def _ablations(self) -> Iterator[Case]:
        name, ratio = grid.ABLATION_METHOD, grid.TUNING_RATIO
        chosen = self._chosen(name, METHODS[name], ratio)
        if chosen is None:
            return
        for what, change in grid.ABLATIONS.items():
            changed = dataclasses.replace(
                chosen,
                flags={**chosen.flags, **change.flags},
                sizes=change.sizes or chosen.sizes,
                settings={"changed": what},
            )
            yield from self._as_case(name, METHODS[name], changed, ratio, stage="ablation", seed=grid.SEEDS[0])

    def _sweep(self) -> Iterator[Case]:
        shape = itertools.product(grid.SWEEP_METHODS, grid.SWEEP_NUM_CODES, grid.SWEEP_NUM_SUBSPACES)
        epochs = max(1, self.study.epochs // 2)
        for name, num_codes, num_subspaces in shape:
            trial = self._chosen(name, METHODS[name], grid.TUNING_RATIO)
            if trial is not None:
                flags = {
                    **self._flags(trial, epochs),
                    "num-codes": num_codes,
                    "num-subspaces": num_subspaces,
                    "num-levels": 1,
                }
                flags["values-dtype"] = "float16"
                yield self._case(method=name, stage="sweep", epochs=epochs, flags=flags)
