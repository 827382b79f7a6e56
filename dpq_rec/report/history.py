"""What a run says of its codes, epoch by epoch. In: a run's folder, with metrics.json. Out: RunHistory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpq_rec.artifact import Artifact
from dpq_rec.errors import ConfigError
from dpq_rec.table import Table

METRICS, ARTIFACT = "metrics.json", "artifact"  # as training names them (contract 2)


class CodeHistory(NamedTuple):
    """How the M codes of a row changed in T epochs.

    Attributes:
        epochs_T: their numbers (int64).
        changed_TM: share of rows whose code is another than the epoch before (float64; DPQ paper, figure 6); NaN where
            there was none.
        perplexity_TM: of the codes' use (float64).
    """

    epochs_T: NDArray[np.int64]
    changed_TM: NDArray[np.float64]
    perplexity_TM: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run that left an artifact.

    Attributes:
        path: its metrics.json.
        recipe, embedding, seed: what was trained; None where the file does not say.
        metrics: on the test split, by name.
        best_epoch: the one whose artifact was kept.
        num_epochs: that were trained.
        codes: table -> how its codes changed; tables without codes are not there.
    """

    path: Path
    recipe: object
    embedding: object
    seed: object
    metrics: Mapping[str, float]
    best_epoch: int | None
    num_epochs: int
    codes: Mapping[str, CodeHistory]


def find_run(artifact: Artifact) -> Path | None:
    """The folder of the run that left an artifact at RUN/artifact; None where it lies elsewhere."""
    folder = artifact.path.resolve()
    return folder.parent if folder.name == ARTIFACT and (folder.parent / METRICS).is_file() else None


def read_run(folder: Path, tables: Mapping[str, Table]) -> RunHistory:
    """A run's history, for the tables of its artifact.

    Raises:
        ConfigError: no metrics.json, one that is not a run's, or that of a run with other tables.
    """
    path = folder / METRICS
    if not path.is_file():
        raise ConfigError(f"--run: {folder} holds no {METRICS}; name the folder of a run that has ended")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        history = found.get("history", [])
        codes = {
            name: _code_history(history, name, table.manifest.layout.codes_per_row)
            for name, table in tables.items()
            if any(name in epoch.get("codes", {}) for epoch in history) and table.manifest.has_codes
        }
        return RunHistory(
            path=path,
            recipe=found.get("recipe"),
            embedding=found.get("embedding"),
            seed=found.get("seed"),
            metrics={str(name): float(value) for name, value in found.get("metrics", {}).items()},
            best_epoch=None if found.get("best_epoch") is None else int(found["best_epoch"]),
            num_epochs=len(history),
            codes=codes,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"--run: {path} is not what the run that made this artifact writes ({wrong}); name that run's folder"
        ) from error


def _code_history(history: list[dict[str, Any]], table: str, codes_per_row: int) -> CodeHistory:
    epochs = [epoch for epoch in history if table in epoch["codes"]]
    stats = [epoch["codes"][table] for epoch in epochs]
    nothing = [np.nan] * codes_per_row
    changed_TM = np.array([nothing if of["changed"] is None else of["changed"] for of in stats], np.float64)
    perplexity_TM = np.array([of["perplexity"] for of in stats], np.float64)
    for got_TM in (changed_TM, perplexity_TM):
        if got_TM.shape != (len(stats), codes_per_row):
            raise ValueError(f"table {table!r} had {got_TM.shape[1:]} codes a row, in this artifact {codes_per_row}")
    if not np.isfinite(perplexity_TM).all() or ((changed_TM < 0) | (changed_TM > 1)).any():
        raise ValueError(f"table {table!r}: want finite perplexities, and shares between 0 and 1")
    return CodeHistory(np.array([epoch["epoch"] for epoch in epochs], np.int64), changed_TM, perplexity_TM)
