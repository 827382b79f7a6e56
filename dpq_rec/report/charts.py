"""The page's figures: bars, the map of code use, curves, strips of codes. In: numbers and text. Out: HTML and SVG.

Whatever is not Markup is text: `fill` escapes it, so that an id or title with `<script>` in it is shown and never run.
"""

from __future__ import annotations

import html
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import CodeLayout

if TYPE_CHECKING:
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
_ROUND_STEPS = [first * 10.0**power for power in range(-3, 20) for first in (1, 2, 5)]
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


def _curve(
    label: str,
    points: Sequence[tuple[int, float, str]],
    x_title: str,
    y_axis: tuple[float, Mapping[float, str]],
    *,
    band: Sequence[tuple[int, float]] = (),
    mark_x: tuple[int, str] | None = None,
    mark_y: tuple[float, str] | None = None,
) -> Markup:
    """A line chart of fixed proportions.

    Args:
        label: what it shows.
        points: of the line: x, y, which may be NaN, and what a dot tells where they are few.
        x_title: what x counts.
        y_axis: the lowest y, and the numbers of y that are marked with how they are written, up to the highest.
        band: corners of an area behind the line.
        mark_x: where a dashed line stands, and what it marks.
        mark_y: where one lies, likewise.
    """
    left, right, top, bottom = 46.0, 366.0, 12.0, 186.0
    (first, last), (low, y_ticks) = (points[0][0], points[-1][0]), y_axis

    def x(number: float) -> float:
        return left + (right - left) * (number - first) / max(last - first, 1)

    def y(number: float) -> float:
        return bottom + (top - bottom) * (number - low) / (max(y_ticks) - low)

    line = '<line x1="{}" x2="{}" y1="{}" y2="{}" class="{}"></line>'
    marks = []
    for number, text in y_ticks.items():
        marks += [fill(line, left, right, y(number), y(number), "grid"), _tick(text, left - 6, y(number) + 4)]
    marks += [_tick(f"{tick:,}", x(tick), bottom + 16, "middle") for tick in _whole_ticks(first, last)]
    marks.append(_tick(x_title, (left + right) / 2, bottom + 31, "middle", "axis"))
    if band:
        corners = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in band)
        marks.append(fill('<polygon points="{}" class="band"></polygon>', corners))
    if mark_x is not None:
        at, side = x(mark_x[0]), 1 if x(mark_x[0]) <= 190 else -1
        marks.append(fill(line, at, at, top, bottom, "mark"))
        marks.append(_tick(mark_x[1], at + 5 * side, top + 10, "start" if side == 1 else "end"))
    if mark_y is not None:
        marks.append(fill(line, left, right, y(mark_y[0]), y(mark_y[0]), "mark"))
        marks.append(_tick(mark_y[1], right, y(mark_y[0]) - 5))
    there = [(x(a), y(b), tip) for a, b, tip in points if not math.isnan(b)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in there)
    marks.append(fill('<polyline points="{}" class="line"></polyline>', path))
    dot = '<circle cx="{}" cy="{}" r="3" class="dot"><title>{}</title></circle>'
    marks += [fill(dot, *point) for point in there if len(there) <= _MOST_DOTS]
    svg = '<svg viewBox="0 0 380 220" role="img" aria-label="{}" class="chart">{}</svg>'
    return fill(svg, label, join(marks))


def _whole_ticks(low: int, high: int) -> list[int]:
    """Whole numbers from low to high, a round step apart, and both ends."""
    step = next(step for step in _ROUND_STEPS if step >= 1 and (high - low) // step < _MOST_TICKS)
    inner = [n for n in range(0, high, int(step)) if low + step / 2 <= n <= high - step / 2]
    return sorted({low, *inner, high})


def _round_ticks(high: float) -> list[float]:
    """Round numbers from 0 to `high` or the next above it."""
    step = next(step for step in _ROUND_STEPS if high / step <= _MOST_TICKS - 1)
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
    noise = float(np.log10(found.tolerance))
    logs_R = np.log10(np.maximum(values_R, 10.0**-decades)).tolist()
    points = [(n + 1, log, f"direction {n + 1}: {values_R[n]:.3g}") for n, log in enumerate(logs_R)]
    mark = (noise, "noise of fp32") if noise >= -decades else None
    return _curve("singular values", points, "direction", (-float(decades), ticks), mark_y=mark)


def history_curves(history: CodeHistory, best_epoch: int | None) -> tuple[Markup, Markup]:
    """Of each epoch the share of codes that changed (DPQ paper, figure 6), and perplexity: means and ranges."""
    shares = {tick: percent(tick) for tick in (0.0, 0.25, 0.5, 0.75, 1.0)}
    perplexities = {tick: f"{tick:,g}" for tick in _round_ticks(float(history.perplexity_TM.max(initial=1.0)))}
    epochs = history.epochs_T.tolist()
    mark = (best_epoch, "this artifact") if best_epoch is not None and epochs[0] <= best_epoch <= epochs[-1] else None

    def curve(
        label: str, numbers_TM: NDArray[np.float64], ticks: dict[float, str], tip: Callable[[float], str]
    ) -> Markup:
        means = zip(epochs, numbers_TM.mean(1).tolist(), strict=True)
        points = [(epoch, mean, f"epoch {epoch}: {tip(mean)}") for epoch, mean in means]
        highs = [*zip(epochs, numbers_TM.max(1).tolist(), strict=True)]
        lows = [*zip(epochs, numbers_TM.min(1).tolist(), strict=True)]
        band = [corner for corner in highs + lows[::-1] if not math.isnan(corner[1])]
        return _curve(label, points, "epoch", (0.0, ticks), band=band, mark_x=mark)

    changed = curve("codes changed", history.changed_TM, shares, percent)
    return changed, curve("perplexity", history.perplexity_TM, perplexities, "{:.1f}".format)


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
