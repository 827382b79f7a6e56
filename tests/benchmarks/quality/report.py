"""Results as Markdown, for training/README.md. In: lines of results, comparisons. Out: a table for each data set."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.quality.grid import ABLATION_METHOD, STUDIES, TUNING_RATIO, Study

Line = Mapping[str, Any]
_ORDER = ("full", "dpq-sx", "dpq-vq")
_SHOWN = {"two-tower": ("recall@10", "ndcg@10", "recall@20", "ndcg@20"), "dlrm": ("auc", "normalised_entropy")}


def tables(lines: Sequence[Line], compared: Sequence[Mapping[str, Any]]) -> str:
    """Final cases of every data set, means over seeds; K, D and L of DPQ fitted after training; ablations."""
    parts = []
    for study in STUDIES:
        of_study = [line for line in lines if line["dataset"] == study.dataset]
        finals = [line for line in of_study if line["stage"] == "final"]
        if finals:
            parts += [f"### {study.dataset}", _table(study, finals, compared)]
        if same := [line for line in of_study if line["stage"] == "same-codes"]:
            parts += ["The same K, D and L, fitted to the trained full table:", _same_codes(study, same)]
        if ablations := [line for line in of_study if line["stage"] == "ablation"]:
            parts += ["The trial that DPQ-VQ chose, with one thing changed:", _ablations(study, of_study, ablations)]
    return "\n\n".join(parts)


def _table(study: Study, lines: Sequence[Line], compared: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[tuple[float, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["case"]["ratio"] or 0, line["method"]), []).append(line)
    shown = _SHOWN[study.recipe]
    full = [line["metrics"][study.metric] for line in groups.get((0, "full"), [])]
    heading = ["tables", "asked", "ratio", "bytes", *shown, "of full", "95 % above", "seeds", "epochs"]
    rows = []
    order = {name: number for number, name in enumerate(_ORDER)}
    for (ratio, method), group in sorted(groups.items(), key=lambda kv: (kv[0][0], order.get(kv[0][1], 9), kv[0][1])):
        means = [statistics.mean(line["metrics"][name] for line in group) for name in shown]
        of_full = (
            statistics.mean(line["metrics"][study.metric] for line in group) / statistics.mean(full) if full else None
        )
        bound = next((c for c in compared if _is_of(c, study, method, ratio)), None)
        cells = [method, f"{ratio:g}" if ratio else "", f"{group[0]['ratio']:.1f}", f"{group[0]['bytes']:,}"]
        cells += [f"{mean:.4f}" for mean in means]
        cells += ["" if of_full is None else f"{of_full:.1%}", "" if bound is None else f"{1 + bound['lower_95']:.1%}"]
        cells += [", ".join(str(line["seed"]) for line in group), ", ".join(str(line["best_epoch"]) for line in group)]
        rows.append(cells)
    return _markdown(heading, rows)


def _is_of(comparison: Mapping[str, Any], study: Study, method: str, ratio: float) -> bool:
    about = (comparison["dataset"], comparison["metric"], comparison["method"], comparison["ratio"] or 0)
    return about == (study.dataset, study.metric, method, ratio)


def _same_codes(study: Study, lines: Sequence[Line]) -> str:
    shown, rows = _SHOWN[study.recipe], []
    for line in lines:
        settings = line["case"]["settings"]
        size = [str(settings[name]) for name in ("num_subspaces", "num_codes", "num_levels")]
        how = [settings[name] for name in ("method", "start") if name in settings]
        cells = [" ".join([line["method"], *how]), *size, f"{line['ratio']:.1f}"]
        rows.append([*cells, *(f"{line['metrics'][name]:.4f}" for name in shown)])
    return _markdown(["fitted by", "D", "K", "L", "ratio", *shown], rows)


def _ablations(study: Study, lines: Sequence[Line], ablations: Sequence[Line]) -> str:
    """Validation metrics: an ablation is for choosing, as a trial is."""
    tried = [
        line
        for line in lines
        if (line["method"], line["stage"], line["case"]["ratio"]) == (ABLATION_METHOD, "trial", TUNING_RATIO)
    ]
    chosen = max(tried, key=lambda line: line["validation"][study.metric])
    rows = []
    for line in (chosen, *ablations):
        value, ratio = line["validation"][study.metric], line["ratio"]
        share = value / chosen["validation"][study.metric]
        rows.append([line["case"]["settings"].get("changed", ""), f"{ratio:.1f}", f"{value:.4f}", f"{share:.1%}"])
    return _markdown(["changed", "ratio", f"{study.metric}, validation", "of the chosen"], rows)


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
