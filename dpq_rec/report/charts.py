"""The page's figures: bars, the map of code use, curves, strips of codes. In: numbers and text. Out: HTML and SVG.

Whatever is not Markup is text: `fill` escapes it, so that an id or title with `<script>` in it is shown and never run.
"""

from __future__ import annotations

import html
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import CodeLayout
from dpq_rec.report.facts import CodeHistory, CodeUse, Spectrum

PART_CLASSES = {
    "packed codes": "p-codes",
    "vectors": "p-codes",
    "values": "p-values",
    "vocabulary": "p-vocabulary",
    "other tensors": "p-other",
    "header, padding": "p-rest",
}
USE_STEPS = ("unused", "< ⅛", "⅛\u2013¼", "¼\u2013½", "½\u20131", "1\u20132", "2\u20134", "4\u20138", "≥ 8")
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_MOST_DECADES = 9
_MOST_TICKS = 6
_MOST_DOTS = 40
_MOST_STRIP = 640  # pixels of a row's codes
_NUMBERED_PITCH = 11  # pixels of a subspace's row that leave room for numbers

# Text


class Markup(str):
    """Text that is HTML already."""


class _EscapingFormatter(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if isinstance(value, Markup):
            return value
        if isinstance(value, float) and not format_spec:  # a place in a drawing: two decimals at most
            return f"{value:.2f}".rstrip("0").rstrip(".")
        # What no page can hold becomes U+FFFD.
        return html.escape(_UNSHOWABLE.sub("\ufffd", super().format_field(value, format_spec)))


def fill(template: str, *values: object, **named: object) -> Markup:
    """`str.format` of HTML: Markup goes in as it is, all else as escaped text."""
    return Markup(_EscapingFormatter().format(template, *values, **named))


def join(parts: Iterable[object], template: str = "{}") -> Markup:
    """Each part in the template, one behind the other."""
    return Markup("".join(fill(template, part) for part in parts))


def byte_text(num_bytes: int) -> str:
    """640 B, 20.5 KB, 512 MB: three digits, in powers of 1,000."""
    size, unit = float(num_bytes), "B"
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    if unit == "B":
        return f"{num_bytes} B"
    return f"{size:.2f} {unit}" if size < 9.995 else f"{size:.1f} {unit}" if size < 99.95 else f"{size:.0f} {unit}"


def percent(share: float) -> str:
    """A share as 45 %, as 3.2 %, or as < 0.1 %."""
    if 0 < share < 0.0005:
        return "<\u00a00.1\u00a0%"
    return f"{100 * share:.1f}\u00a0%" if 0 < share < 0.0995 else f"{100 * share:.0f}\u00a0%"


# Bytes


def byte_bars(parts: Mapping[str, int], full_bytes: int, *, enlarged: bool) -> Markup:
    """The fp32 table and the file to one scale, and the file's parts enlarged where they would be too small to see."""
    total = sum(parts.values())
    longest = max(full_bytes, total, 1)
    segments = join(
        fill(
            '<i class="{}" style="flex:{} 0 0" title="{}: {:,} B"></i>', PART_CLASSES[what], num_bytes, what, num_bytes
        )
        for what, num_bytes in parts.items()
    )
    line = '<div class="barline"><span>{}</span><div>{}</div><b>{}</b></div>'
    bar = '<div class="bar{}" style="width:{:.3f}%">{}</div>'
    lines = [
        fill(line, "as fp32", fill(bar, " p-full", 100 * full_bytes / longest, ""), byte_text(full_bytes)),
        fill(line, "on disk", fill(bar, "", 100 * total / longest, segments), byte_text(total)),
    ]
    if enlarged:
        wedge = '<svg viewBox="0 0 100 10" preserveAspectRatio="none" class="wedge" aria-hidden="true">{}</svg>'
        polygon = fill('<polygon points="0,0 {:.3f},0 100,10 0,10"></polygon>', 100 * total / longest)
        zoom = join([fill(wedge, polygon), fill(bar, "", 100.0, segments)])
        lines.append(fill('<div class="zoom">{}</div>', fill(line, "", zoom, "")))
    return join(lines)


# Code use


def heat_map(use: CodeUse, layout: CodeLayout) -> Markup:
    """Codes of each subspace, the most used first (DPQ paper, figure 5); perplexity and unused codes beside them.

    Codes of a step of `USE_STEPS` lie side by side once they are sorted, so that a subspace takes nine rectangles
    whatever K is.
    """
    num_groups, num_codes = use.counts_MK.shape
    pitch = max(2, min(16, 448 // num_groups))
    edge = '<line x1="0" x2="{0}" y1="{1}" y2="{1}" class="edge"></line>'
    edges = [fill(edge, num_codes, y) for y in range(layout.num_subspaces, num_groups, layout.num_subspaces)]
    names = [
        _tick(_group_name(layout, m), 52, m * pitch + pitch / 2 + 4) for m in range(0, num_groups, -(-14 // pitch))
    ]
    return fill(
        '<div class="heatgrid"><div class="head">{name}</div><div class="head">codes, the most used first</div>'
        '<div class="head two"><span>perplexity (of {num_codes:,})</span>{unused}</div>'
        '<svg width="56" height="{height}" aria-hidden="true">{names}</svg>'
        '<svg viewBox="0 0 {num_codes} {num_groups}" preserveAspectRatio="none" role="img" class="heat{fine}" '
        'aria-label="use of {num_codes} codes in {num_groups} subspaces" style="height:{height}px">{rows}</svg>'
        '<svg width="194" height="{height}" role="img" aria-label="perplexities">{perplexities}</svg></div>',
        name="subspace" if layout.num_levels == 1 else "level, subspace",
        unused=Markup("<span>unused</span>" if pitch >= _NUMBERED_PITCH else ""),
        num_codes=num_codes,
        num_groups=num_groups,
        height=num_groups * pitch,
        names=join(names),
        fine="" if pitch >= _NUMBERED_PITCH else " fine",
        rows=join([*(_use_of_group(use, layout, m) for m in range(num_groups)), *edges]),
        perplexities=join(_perplexity_bar(use, m, pitch) for m in range(num_groups)),
    )


def use_steps(counts_MK: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each code, the step of `USE_STEPS` that its use falls in: its rows times K / V, 1 where all are used alike."""
    use_MK = counts_MK * (counts_MK.shape[1] / np.maximum(counts_MK.sum(1, keepdims=True), 1))
    steps_MK = np.floor(np.log2(use_MK, where=use_MK > 0, out=np.zeros_like(use_MK))) + 5
    return np.where(use_MK > 0, np.clip(steps_MK, 1, len(USE_STEPS) - 1), 0).astype(np.int64)


def _use_of_group(use: CodeUse, layout: CodeLayout, m: int) -> Markup:
    """A row of the map; where codes are unused, the hatched ground shows."""
    counts_K = use.counts_MK[m]
    num_used, most = (counts_K > 0).sum(), int(counts_K.argmax())
    title = (
        f"{_group_name(layout, m)}: {num_used:,} of {len(counts_K):,} codes used, perplexity "
        f"{use.perplexity_M[m]:.1f}; the most used, {most:,}, has "
        f"{percent(counts_K[most] / max(1, counts_K.sum()))} of the rows"
    )
    widths = np.bincount(use_steps(counts_K[None])[0], minlength=len(USE_STEPS)).tolist()
    cells, begin = [], 0
    for step in range(len(USE_STEPS) - 1, 0, -1):
        if widths[step]:
            cell = '<rect x="{}" y="{}" width="{}" height="1" class="u{}"></rect>'
            cells.append(fill(cell, begin, m, widths[step], step))
            begin += widths[step]
    return fill("<g><title>{}</title>{}</g>", title, join(cells))


def _group_name(layout: CodeLayout, m: int) -> str:
    """How code m of a row is called."""
    level, j = divmod(m, layout.num_subspaces)
    return f"{j}" if layout.num_levels == 1 else f"{level}·{j}"


def _perplexity_bar(use: CodeUse, m: int, pitch: int) -> Markup:
    """A bar as long as the perplexity's share of K, the number, and the unused codes."""
    num_unused, perplexity = int((use.counts_MK[m] == 0).sum()), float(use.perplexity_M[m])
    bar = '<rect x="0" y="{}" width="{}" height="{}" class="{}"></rect>'
    widths = {"rail": 100, "fill": 100 * perplexity / use.counts_MK.shape[1]}
    marks = [fill(bar, (m + 0.15) * pitch, width, pitch * 0.7, name) for name, width in widths.items()]
    if pitch >= _NUMBERED_PITCH:
        y = m * pitch + pitch / 2 + 4
        marks += [_tick(f"{perplexity:,.1f}", 146, y), _tick(f"{num_unused:,}" if num_unused else "\u2013", 190, y)]
    return join(marks)


# Curves


def _tick(text: str, x: float, y: float, anchor: str = "end", name: str = "tick") -> Markup:
    template = '<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>'
    return fill(template, x, y, name, anchor, text)


class _Chart:
    """A line chart of fixed proportions.

    Args:
        label: what it shows.
        x_title: what x counts.
        x_ends: the least and the greatest number of x.
        y_ends: likewise.
        y_ticks: numbers of y that are marked, and how they are written.
    """

    width, height, left, right, top, bottom = 380.0, 220.0, 46.0, 366.0, 12.0, 186.0

    def __init__(
        self,
        label: str,
        x_title: str,
        x_ends: tuple[int, int],
        y_ends: tuple[float, float],
        y_ticks: Mapping[float, str],
    ) -> None:
        self.label, self.y_ends = label, y_ends
        self.x_ends = x_ends[0], max(x_ends[1], x_ends[0] + 1)
        self.marks: list[Markup] = []
        for number, text in y_ticks.items():
            self._line(self.left, self.right, self.y(number), self.y(number), "grid")
            self.marks.append(_tick(text, self.left - 6, self.y(number) + 4))
        self.marks += [_tick(f"{tick:,}", self.x(tick), self.height - 18, "middle") for tick in whole_ticks(*x_ends)]
        self.marks.append(_tick(x_title, (self.left + self.right) / 2, self.height - 3, "middle", "axis"))

    def x(self, number: float) -> float:
        """Where a number of x lies."""
        return self.left + (self.right - self.left) * (number - self.x_ends[0]) / (self.x_ends[1] - self.x_ends[0])

    def y(self, number: float) -> float:
        """Where a number of y lies."""
        return self.bottom + (self.top - self.bottom) * (number - self.y_ends[0]) / (self.y_ends[1] - self.y_ends[0])

    def _line(self, x1: float, x2: float, y1: float, y2: float, name: str) -> None:
        self.marks.append(fill('<line x1="{}" x2="{}" y1="{}" y2="{}" class="{}"></line>', x1, x2, y1, y2, name))

    def mark_x(self, number: float, text: str) -> None:
        """A dashed line at a number of x, and what it marks."""
        at = self.x(number)
        self._line(at, at, self.top, self.bottom, "mark")
        is_right = at > self.width / 2
        self.marks.append(_tick(text, at - 5 if is_right else at + 5, self.top + 10, "end" if is_right else "start"))

    def mark_y(self, number: float, text: str) -> None:
        """A dashed line at a number of y, and what it marks."""
        self._line(self.left, self.right, self.y(number), self.y(number), "mark")
        self.marks.append(_tick(text, self.right, self.y(number) - 5))

    def band(self, xs_T: NDArray[np.number], lows_T: NDArray[np.float64], highs_T: NDArray[np.float64]) -> None:
        """The area between two lines; nothing where there is a NaN."""
        (there_P,) = (~np.isnan(lows_T)).nonzero()
        edge = [*((t, highs_T) for t in there_P), *((t, lows_T) for t in there_P[::-1])]
        points = " ".join(f"{self.x(xs_T[t]):.1f},{self.y(ys_T[t]):.1f}" for t, ys_T in edge)
        self.marks.append(fill('<polygon points="{}" class="band"></polygon>', points))

    def line(self, xs_T: NDArray[np.number], ys_T: NDArray[np.float64], tips: Sequence[str]) -> Markup:
        """The whole chart, with a line through points, and dots that tell their numbers where there are few."""
        there = [(self.x(x), self.y(y), tip) for x, y, tip in zip(xs_T, ys_T, tips, strict=True) if not math.isnan(y)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in there)
        self.marks.append(fill('<polyline points="{}" class="line"></polyline>', points))
        dot = '<circle cx="{}" cy="{}" r="3" class="dot"><title>{}</title></circle>'
        self.marks += [fill(dot, *point) for point in there] if len(there) <= _MOST_DOTS else []
        svg = '<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}" class="chart">{}</svg>'
        return fill(svg, self.width, self.height, self.label, join(self.marks))


def whole_ticks(low: int, high: int) -> list[int]:
    """Whole numbers from low to high, a round step apart, and both ends."""
    step = next(
        s * 10**power for power in range(20) for s in (1, 2, 5) if (high - low) // (s * 10**power) < _MOST_TICKS
    )
    inner = [n for n in range(-(-low // step) * step, high + 1, step) if low + step / 2 <= n <= high - step / 2]
    return sorted({low, *inner, high})


def round_ticks(high: float) -> list[float]:
    """Round numbers from 0 to `high` or the next above it."""
    steps = (s * 10.0**power for power in range(-3, 20) for s in (1, 2, 5))
    step = next(step for step in steps if high / step <= _MOST_TICKS - 1)
    return [at * step for at in range(math.ceil(high / step) + 1)]


def spectrum_curve(found: Spectrum) -> Markup:
    """Singular values, each as a share of the largest, on a logarithmic scale."""
    values_R = found.singular_values_R / found.singular_values_R[0]
    decades = max(1, int(np.ceil(-np.log10(max(values_R.min(), 10.0**-_MOST_DECADES)))))
    if decades <= 2:  # 0.5 and 0.2 and their like, too
        shares = [first * 10.0**-at for at in range(decades) for first in (1, 0.5, 0.2)] + [10.0**-decades]
        ticks = {float(np.log10(share)): f"{share:g}" for share in shares}
    else:
        step = 1 if decades <= _MOST_DECADES // 2 else 2
        ticks = {-float(at): f"{10.0**-at:g}" if at <= 3 else f"1e-{at}" for at in range(0, decades + 1, step)}
    chart = _Chart("singular values", "direction", (1, len(values_R)), (-float(decades), 0.0), ticks)
    if (noise := float(np.log10(found.tolerance))) >= -decades:
        chart.mark_y(noise, "noise of fp32")
    tips = [f"direction {n}: {value:.3g}" for n, value in enumerate(values_R.tolist(), 1)]
    return chart.line(np.arange(1, len(values_R) + 1), np.log10(np.maximum(values_R, 10.0**-decades)), tips)


def changed_curve(history: CodeHistory, best_epoch: int | None) -> Markup:
    """The share of codes that changed in an epoch: mean over subspaces, and their range (DPQ paper, figure 6)."""
    ticks = {tick: percent(tick) for tick in (0.0, 0.25, 0.5, 0.75, 1.0)}
    tips = [percent(mean) for mean in history.changed_TM.mean(1).tolist()]
    return _curve_of_epochs("codes changed", history.epochs_T, history.changed_TM, best_epoch, ticks, tips)


def perplexity_curve(history: CodeHistory, best_epoch: int | None) -> Markup:
    """Perplexity after each epoch: mean over subspaces, and their range."""
    ticks = {tick: f"{tick:,g}" for tick in round_ticks(float(history.perplexity_TM.max(initial=1.0)))}
    tips = [f"{mean:.1f}" for mean in history.perplexity_TM.mean(1).tolist()]
    return _curve_of_epochs("perplexity", history.epochs_T, history.perplexity_TM, best_epoch, ticks, tips)


def _curve_of_epochs(
    label: str,
    epochs_T: NDArray[np.int64],
    numbers_TM: NDArray[np.float64],
    best_epoch: int | None,
    ticks: Mapping[float, str],
    tips: Sequence[str],
) -> Markup:
    first, last = int(epochs_T[0]), int(epochs_T[-1])
    chart = _Chart(label, "epoch", (first, last), (0.0, max(ticks)), ticks)
    chart.band(epochs_T, numbers_TM.min(1), numbers_TM.max(1))
    if best_epoch is not None and first <= best_epoch <= last:
        chart.mark_x(best_epoch, "this artifact")
    tips = [f"epoch {epoch}: {tip}" for epoch, tip in zip(epochs_T.tolist(), tips, strict=True)]
    return chart.line(epochs_T, numbers_TM.mean(1), tips)


# Codes side by side


def same_codes(codes_M: NDArray[np.uint16], chosen_M: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Which of a row's codes [M] are the chosen row's, which may have fewer levels or more."""
    both = min(len(codes_M), len(chosen_M))
    return np.pad(codes_M[:both] == chosen_M[:both], (0, len(codes_M) - both))


def code_strip(codes_M: NDArray[np.uint16], chosen_M: NDArray[np.uint16], num_codes: int) -> Markup:
    """A row's codes, coloured where they are the chosen row's; numbers where there is room (DPQ paper, table 8)."""
    same_M = same_codes(codes_M, chosen_M)
    num_same, width = int(same_M.sum()), 7 * len(str(num_codes - 1)) + 6
    label = f"{num_same} of {len(codes_M)} codes are the same: {' '.join(map(str, codes_M.tolist()))}"
    if len(codes_M) * width > _MOST_STRIP:
        runs = " ".join(f"M{m} 0h1v1h-1z" for m in np.flatnonzero(same_M).tolist())
        return fill(
            '<svg viewBox="0 0 {0} 1" preserveAspectRatio="none" role="img" aria-label="{1}" class="strip plain" '
            'style="max-width:{2}px"><rect width="{0}" height="1" class="other"></rect>'
            '<path d="{3}" class="same"></path></svg>',
            *(len(codes_M), label, min(_MOST_STRIP, 5 * len(codes_M)), runs),
        )
    cell = (
        '<rect x="{}" y="0.5" width="{}" height="17" class="{name}"></rect>'
        '<text x="{}" y="13" text-anchor="middle" class="{name}">{}</text>'
    )
    cells = [
        fill(cell, m * width + 0.5, width - 1, m * width + width / 2, code, name="same" if same else "other")
        for m, (code, same) in enumerate(zip(codes_M.tolist(), same_M, strict=True))
    ]
    svg = '<svg viewBox="0 0 {0} 18" role="img" aria-label="{1}" style="max-width:{0}px" class="strip">{2}</svg>'
    return fill(svg, width * len(codes_M), label, join(cells))
