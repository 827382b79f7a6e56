"""Line charts. In: numbers. Out: an SVG of fixed proportions, with axes that say what they count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpq_rec.report.markup import Markup, element, join

_WIDTH, _HEIGHT = 380.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 12.0, 34.0
_MOST_TICKS = 6
_MOST_DOTS = 40


class Axis:
    """Numbers to positions between two ends of a drawing."""

    def __init__(self, numbers: tuple[float, float], positions: tuple[float, float]) -> None:
        self.numbers, self.positions = numbers, positions

    def __call__(self, number: float) -> float:
        """The position of a number."""
        (low, high), (begin, end) = self.numbers, self.positions
        return begin + (end - begin) * (number - low) / ((high - low) or 1.0)


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The axes of a chart.

    Attributes:
        x: from the least to the greatest number that is drawn.
        y: likewise.
        x_title: what x counts.
        y_ticks: numbers of y that are marked, and how they are written.
        x_ticks: numbers of x that are marked.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    x_title: str
    y_ticks: Sequence[tuple[float, str]]
    x_ticks: Sequence[int]


def whole_ticks(low: int, high: int) -> list[int]:
    """Whole numbers from low to high, a round step apart, and both ends."""
    step = next(
        s * 10**power for power in range(20) for s in (1, 2, 5) if (high - low) // (s * 10**power) < _MOST_TICKS
    )
    inner = [n for n in range(-(-low // step) * step, high + 1, step) if low + step / 2 <= n <= high - step / 2]
    return sorted({low, *inner, high})


def round_ticks(high: float) -> list[float]:
    """Round numbers from 0 to `high` or the next above it."""
    step = next(
        s * 10.0**power for power in range(-3, 20) for s in (1, 2, 5) if high / (s * 10.0**power) <= _MOST_TICKS - 1
    )
    return [at * step for at in range(math.ceil(high / step) + 1)]


def chart(scales: Scales, label: str, *series: Markup) -> Markup:
    """Axes, and series that were drawn on them."""
    x, y = axes(scales)
    marks = []
    for number, text in scales.y_ticks:
        marks.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(number), y2=y(number), class_="grid"))
        marks.append(element("text", text, x=_LEFT - 6, y=y(number) + 4, class_="tick", text_anchor="end"))
    marks += [
        element("text", f"{tick:,}", x=x(tick), y=_HEIGHT - 18, class_="tick", text_anchor="middle")
        for tick in scales.x_ticks
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    marks.append(element("text", scales.x_title, x=middle, y=_HEIGHT - 3, class_="axis", text_anchor="middle"))
    box = f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}"
    return element("svg", *marks, *series, viewBox=box, role="img", aria_label=label, class_="chart")


def axes(scales: Scales) -> tuple[Axis, Axis]:
    """Where the numbers of x and y lie in the drawing."""
    return Axis(scales.x, (_LEFT, _WIDTH - _RIGHT)), Axis(scales.y, (_HEIGHT - _BOTTOM, _TOP))


def line(scales: Scales, xs: NDArray[np.number], ys: NDArray[np.float64], tips: Sequence[str]) -> Markup:
    """A line through points, with dots that tell their numbers where there are few; a NaN is a gap's end."""
    x, y = axes(scales)
    points = [(x(a), y(b), tip) for a, b, tip in zip(xs.tolist(), ys.tolist(), tips, strict=True) if not math.isnan(b)]
    path = element("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b, _ in points), class_="line")
    shown = points if len(points) <= _MOST_DOTS else []
    dots = [element("circle", element("title", tip), cx=a, cy=b, r=3, class_="dot") for a, b, tip in shown]
    return join([path, *dots])


def band(scales: Scales, xs: NDArray[np.number], lows: NDArray[np.float64], highs: NDArray[np.float64]) -> Markup:
    """The area between two lines."""
    x, y = axes(scales)
    there = ~(np.isnan(lows) | np.isnan(highs))
    edge = [*zip(xs[there], highs[there], strict=True), *zip(xs[there][::-1], lows[there][::-1], strict=True)]
    return element("polygon", points=" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in edge), class_="band")


def upright(scales: Scales, number: float, text: str) -> Markup:
    """A dashed line at a number of x, and what it marks."""
    at = axes(scales)[0](number)
    side = "end" if at > _WIDTH / 2 else "start"
    return join(
        [
            element("line", x1=at, x2=at, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="mark"),
            element("text", text, x=at - 5 if side == "end" else at + 5, y=_TOP + 10, class_="tick", text_anchor=side),
        ]
    )


def level(scales: Scales, number: float, text: str) -> Markup:
    """A dashed line at a number of y, and what it marks."""
    at = axes(scales)[1](number)
    return join(
        [
            element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="mark"),
            element("text", text, x=_WIDTH - _RIGHT, y=at - 5, class_="tick", text_anchor="end"),
        ]
    )
