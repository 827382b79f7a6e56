"""Results as pictures. In: lines of results. Out: quality_*.png beside them.

Metric against ratio for every method (DPQ paper, figure 8), heat maps over K and D (figures 3 and 7), and time and
memory of whole runs against full (figure 4; steps alone are in cost.png).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.quality.grid import METHODS, STUDIES, Study

Line = Mapping[str, Any]
_COLORS = {"full": "black", "dpq-vq": "red", "dpq-sx": "darkorange"}  # baselines: of a map without these two
_MARKERS = {"full": "*", "trained": "s", "post-training": "^"}


def draw(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Draw what the lines suffice for; the pictures."""
    paths = []
    if finals := [line for line in lines if line["stage"] == "final"]:
        paths.append(_against_ratio(finals, folder / "quality_ratio.png"))
        paths.append(_costs(finals, folder / "quality_cost.png"))
    if sweep := [line for line in lines if line["stage"] == "sweep"]:
        paths.append(_heat_maps(sweep, folder / "quality_k_d.png"))
    return paths


def curve(lines: Sequence[Line], method: str, metric: str) -> list[tuple[float, float]]:
    """Ratio and mean metric over seeds of each size of a method, by rising ratio."""
    points: dict[float, list[Line]] = {}
    for line in lines:
        if line["method"] == method:
            points.setdefault(line["case"]["ratio"] or 0, []).append(line)
    means = [
        (statistics.mean(line["ratio"] for line in group), statistics.mean(line["metrics"][metric] for line in group))
        for group in points.values()
    ]
    return sorted(means)


def _studies(lines: Sequence[Line]) -> list[Study]:
    datasets = {line["dataset"] for line in lines}
    return [study for study in STUDIES if study.dataset in datasets]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _against_ratio(lines: Sequence[Line], path: Path) -> Path:
    pyplot, studies = _pyplot(), _studies(lines)
    figure, axes = pyplot.subplots(1, len(studies), figsize=(6 * len(studies), 5), layout="constrained", squeeze=False)
    for axis, study in zip(axes[0], studies, strict=True):
        of_study = [line for line in lines if line["dataset"] == study.dataset]
        for number, method in enumerate(METHODS):
            points = curve(of_study, method, study.metric)
            if not points:
                continue
            color = _COLORS.get(method, pyplot.get_cmap("tab20b")(2 * number % 20 + number // 10))
            marker = _MARKERS.get(METHODS[method].kind, "o")
            if method == "full":
                axis.axhline(points[0][1], color=color, linewidth=1, linestyle=":")
            width = 2.0 if method.startswith("dpq") else 1.0
            axis.plot(*zip(*points, strict=True), label=method, color=color, marker=marker, linewidth=width)
        axis.set_xscale("log")
        axis.set_xlabel("compression ratio of all tables")
        axis.set_ylabel(f"{study.metric}, test")
        axis.set_title(study.dataset)
        axis.grid(alpha=0.3)
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    return _saved(figure, path)


def grid_of(lines: Sequence[Line], method: str, value: Any) -> tuple[list[int], list[int], Any]:
    """K, D, and value(line) of a method's sweep as an array [K, D]; NaN where there is none."""
    cells = {
        (line["case"]["flags"]["num-codes"], line["case"]["flags"]["num-subspaces"]): value(line)
        for line in lines
        if line["method"] == method
    }
    num_codes, num_subspaces = (sorted({key[place] for key in cells}) for place in (0, 1))
    values_KD = np.array([[cells.get((k, d), np.nan) for d in num_subspaces] for k in num_codes])
    return num_codes, num_subspaces, values_KD


def _heat_maps(lines: Sequence[Line], path: Path) -> Path:
    """For each data set and method the metric; then the ratios."""
    pyplot, studies = _pyplot(), _studies(lines)
    methods = sorted({line["method"] for line in lines})
    shape = (len(studies), len(methods) + 1)
    figure, axes = pyplot.subplots(*shape, figsize=(4.2 * shape[1], 4 * shape[0]), layout="constrained", squeeze=False)
    for row, study in zip(axes, studies, strict=True):
        of_study = [line for line in lines if line["dataset"] == study.dataset]
        for axis, method in zip(row, methods, strict=False):
            found = grid_of(of_study, method, lambda line, metric=study.metric: line["metrics"][metric])
            _heat_map(axis, found, f"{study.dataset}: {study.metric} ({method})", "{:.4f}")
        ratios = grid_of(of_study, methods[0], lambda line: line["ratio"])
        _heat_map(row[-1], ratios, f"{study.dataset}: compression ratio", "{:.1f}")
    return _saved(figure, path)


def _heat_map(axis: Any, found: tuple[list[int], list[int], Any], title: str, form: str) -> None:
    num_codes, num_subspaces, values_KD = found
    if not values_KD.size:
        axis.axis("off")
        return
    axis.imshow(values_KD, cmap="Blues", aspect="auto")
    middle = (np.nanmin(values_KD) + np.nanmax(values_KD)) / 2
    for (k, d), value in np.ndenumerate(values_KD):
        if not np.isnan(value):
            axis.text(d, k, form.format(value), ha="center", va="center", color="white" if value > middle else "black")
    axis.set_title(title, fontsize="medium")
    axis.set_xticks(range(len(num_subspaces)), num_subspaces)
    axis.set_yticks(range(len(num_codes)), num_codes)
    axis.set_xlabel("D, subspaces")
    axis.set_ylabel("K, codes")


def _costs(lines: Sequence[Line], path: Path) -> Path:
    """Seconds for an example and peak memory of methods that are trained, over full's."""
    pyplot, studies = _pyplot(), _studies(lines)
    figure, axes = pyplot.subplots(2, len(studies), figsize=(5 * len(studies), 6), layout="constrained", squeeze=False)
    measures = (
        ("time for an example", lambda line: 1 / line["examples_per_second"]),
        ("peak memory", lambda line: line["peak_memory_bytes"]),
    )
    for column, study in enumerate(studies):
        trained = [line for line in lines if line["dataset"] == study.dataset and "examples_per_second" in line]
        for row, (title, measure) in enumerate(measures):
            axis, of_full = axes[row][column], [measure(line) for line in trained if line["method"] == "full"]
            if not of_full:
                axis.axis("off")
                continue
            names = [name for name in METHODS if any(line["method"] == name for line in trained)]
            medians = [statistics.median(measure(line) for line in trained if line["method"] == name) for name in names]
            bars = axis.bar(names, [median / statistics.median(of_full) for median in medians], color="tab:blue")
            axis.bar_label(bars, fmt="%.2f", fontsize="small")
            axis.axhline(1, color="black", linewidth=0.8)
            axis.margins(y=0.15)
            axis.set_title(f"{study.dataset}: {title}, of full", fontsize="medium")
            axis.tick_params(axis="x", rotation=30)
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    return path
