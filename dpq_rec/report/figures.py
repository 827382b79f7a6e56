"""The figures of a table. In: facts. Out: Markup. What each shows is said in `section`, beside it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dpq_rec.codes import CodeLayout
from dpq_rec.report import charts
from dpq_rec.report.facts import CodeUse
from dpq_rec.report.history import CodeHistory
from dpq_rec.report.markup import Markup, byte_text, element, join, percent
from dpq_rec.report.spectrum import Spectrum

PART_CLASSES = {
    "packed codes": "p-codes",
    "vectors": "p-codes",
    "values": "p-values",
    "vocabulary": "p-vocabulary",
    "other tensors": "p-other",
    "header, padding": "p-rest",
}
USE_STEPS = (
    "unused",
    "< \u215b",
    "\u215b\u2013\u00bc",
    "\u00bc\u2013\u00bd",
    "\u00bd\u20131",
    "1\u20132",
    "2\u20134",
    "4\u20138",
    "\u2265 8",
)
_MOST_DECADES = 9
_MOST_STRIP = 640  # pixels of a row's codes
_NUMBERED_PITCH = 11  # pixels of a subspace's row that leave room for numbers

# Bytes


def byte_bars(parts: Mapping[str, int], full_bytes: int, *, enlarged: bool) -> Markup:
    """The fp32 table and the file to one scale, and the file's parts enlarged where they would be too small to see."""
    total = sum(parts.values())
    longest = max(full_bytes, total, 1)
    rows = [
        ("as fp32", element("div", style=_width(full_bytes / longest), class_="bar p-full"), byte_text(full_bytes)),
        ("on disk", element("div", *_segments(parts), style=_width(total / longest), class_="bar"), byte_text(total)),
    ]
    lines = [_bar_line(name, bar, size) for name, bar, size in rows]
    if enlarged:
        corners = f"0,0 {100 * total / longest:.3f},0 100,10 0,10"
        wedge = element(
            "svg",
            element("polygon", points=corners),
            viewBox="0 0 100 10",
            preserveAspectRatio="none",
            class_="wedge",
            aria_hidden="true",
        )
        bar = element("div", *_segments(parts), style=_width(1), class_="bar")
        lines.append(element("div", _bar_line("", join([wedge, bar]), ""), class_="zoom"))
    return join(lines)


def _width(share: float) -> str:
    return f"width:{100 * share:.3f}%"


def _bar_line(name: str, bar: Markup, size: str) -> Markup:
    return element("div", element("span", name), element("div", bar), element("b", size), class_="barline")


def _segments(parts: Mapping[str, int]) -> list[Markup]:
    return [
        element("i", class_=PART_CLASSES[what], style=f"flex:{num_bytes} 0 0", title=f"{what}: {num_bytes:,} B")
        for what, num_bytes in parts.items()
    ]


# Code use


def use_steps(counts_MK: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each code, the step of `USE_STEPS` that its use falls in: its rows times K / V, 1 where all are used alike."""
    use_MK = counts_MK * (counts_MK.shape[1] / np.maximum(counts_MK.sum(1, keepdims=True), 1))
    steps_MK = np.floor(np.log2(use_MK, where=use_MK > 0, out=np.zeros_like(use_MK))) + 5
    return np.where(use_MK > 0, np.clip(steps_MK, 1, len(USE_STEPS) - 1), 0).astype(np.int64)


def heat_map(use: CodeUse, layout: CodeLayout) -> Markup:
    """Codes of each subspace, the most used first (DPQ paper, figure 5); perplexity and unused codes beside them.

    Codes of a step lie side by side once they are sorted, so that a subspace takes nine rectangles whatever K is.
    """
    steps_MK = use_steps(use.counts_MK)
    num_groups, num_codes = steps_MK.shape
    pitch = max(2, min(16, 448 // num_groups))
    bands = [element("g", element("title", _tip(use, layout, m)), *_runs(steps_MK[m], m)) for m in range(num_groups)]
    edges = [
        element("line", x1=0, x2=num_codes, y1=y, y2=y, class_="edge")
        for y in range(layout.num_subspaces, num_groups, layout.num_subspaces)
    ]
    cells = element(
        "svg",
        *bands,
        *edges,
        viewBox=f"0 0 {num_codes} {num_groups}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"use of {num_codes} codes in {num_groups} subspaces",
        style=f"height:{num_groups * pitch}px",
        class_="heat" if pitch >= _NUMBERED_PITCH else "heat fine",
    )
    heads = ("subspace" if layout.num_levels == 1 else "level, subspace", "codes, the most used first")
    beside = (element("span", f"perplexity (of {num_codes:,})"), element("span", "unused"))[
        : 1 + (pitch >= _NUMBERED_PITCH)
    ]
    return element(
        "div",
        *(element("div", head, class_="head") for head in heads),
        element("div", *beside, class_="head two"),
        _row_names(layout, pitch),
        cells,
        _perplexities(use, pitch),
        class_="heatgrid",
    )


def _runs(steps_K: NDArray[np.int64], m: int) -> list[Markup]:
    """Rectangles of equal steps in a row of the map."""
    widths = np.bincount(steps_K, minlength=len(USE_STEPS))[::-1]
    begins = np.concatenate([[0], np.cumsum(widths)[:-1]])
    return [
        element("rect", x=int(begin), y=m, width=int(width), height=1, class_=f"u{len(USE_STEPS) - 1 - at}")
        for at, (begin, width) in enumerate(zip(begins, widths, strict=True))
        if width and at < len(USE_STEPS) - 1  # the unused: the hatched ground shows
    ]


def _tip(use: CodeUse, layout: CodeLayout, m: int) -> str:
    counts_K = use.counts_MK[m]
    most = int(counts_K.argmax())
    share = percent(counts_K[most] / max(1, counts_K.sum()))
    return (
        f"{group_name(layout, m)}: {(counts_K > 0).sum():,} of {len(counts_K):,} codes used, perplexity "
        f"{use.perplexity_M[m]:.1f}; the most used, {most:,}, has {share} of the rows"
    )


def group_name(layout: CodeLayout, m: int) -> str:
    """How code m of a row is called."""
    of_level, j = divmod(m, layout.num_subspaces)
    return f"{j}" if layout.num_levels == 1 else f"{of_level}\u00b7{j}"


def _row_names(layout: CodeLayout, pitch: int) -> Markup:
    step = max(1, -(-14 // pitch))
    names = [
        element("text", group_name(layout, m), x=52, y=m * pitch + pitch / 2 + 4, class_="tick", text_anchor="end")
        for m in range(0, layout.codes_per_row, step)
    ]
    return element("svg", *names, width=56, height=layout.codes_per_row * pitch, aria_hidden="true")


def _perplexities(use: CodeUse, pitch: int) -> Markup:
    """A bar as long as the perplexity's share of K, the number, and the unused codes."""
    num_groups, num_codes = use.counts_MK.shape
    unused_M = (use.counts_MK == 0).sum(1)
    marks = []
    for m in range(num_groups):
        y = m * pitch
        length = 100 * float(use.perplexity_M[m]) / num_codes
        marks.append(element("rect", x=0, y=y + pitch * 0.15, width=100, height=pitch * 0.7, class_="rail"))
        marks.append(element("rect", x=0, y=y + pitch * 0.15, width=length, height=pitch * 0.7, class_="fill"))
        if pitch >= _NUMBERED_PITCH:
            texts = ((146, f"{use.perplexity_M[m]:,.1f}"), (190, f"{unused_M[m]:,}" if unused_M[m] else "\u2013"))
            marks.extend(
                element("text", text, x=x, y=y + pitch / 2 + 4, class_="tick", text_anchor="end") for x, text in texts
            )
    return element("svg", *marks, width=194, height=num_groups * pitch, role="img", aria_label="perplexities")


# Curves


def spectrum_curve(found: Spectrum) -> Markup:
    """Singular values, each as a share of the largest, on a logarithmic scale."""
    values_R = found.singular_values_R / found.singular_values_R[0]
    least = max(values_R.min(), 10.0**-_MOST_DECADES)
    decades = max(1, int(np.ceil(-np.log10(least))))
    logs_R = np.log10(np.maximum(values_R, 10.0**-decades))
    scales = charts.Scales(
        x=(1.0, float(max(2, len(values_R)))),
        y=(-float(decades), 0.0),
        x_title="direction",
        y_ticks=_share_ticks(decades),
        x_ticks=charts.whole_ticks(1, len(values_R)),
    )
    numbers = np.arange(1, len(values_R) + 1)
    tips = [f"direction {n}: {value:.3g}" for n, value in zip(numbers.tolist(), values_R.tolist(), strict=True)]
    noise = np.log10(found.tolerance)
    limit = [charts.level(scales, float(noise), "noise of fp32")] if noise >= -decades else []
    return charts.chart(scales, "singular values", *limit, charts.line(scales, numbers, logs_R, tips))


def _share_ticks(decades: int) -> list[tuple[float, str]]:
    """1, 0.1, 0.01, ...; where they are few, 0.5 and 0.2 and their like between them."""
    if decades <= 2:
        shares = [first * 10.0**-at for at in range(decades) for first in (1, 0.5, 0.2)] + [10.0**-decades]
        return [(float(np.log10(share)), f"{share:g}") for share in shares]
    step = 1 if decades <= _MOST_DECADES // 2 else 2
    return [(-float(at), f"{10.0**-at:g}" if at <= 3 else f"1e-{at}") for at in range(0, decades + 1, step)]


def changed_curve(history: CodeHistory, best_epoch: int | None) -> Markup:
    """The share of codes that changed in an epoch: mean over subspaces, and their range (DPQ paper, figure 6)."""
    return _epochs(history.epochs_T, history.changed_TM, best_epoch, "codes changed", is_share=True)


def perplexity_curve(history: CodeHistory, best_epoch: int | None) -> Markup:
    """Perplexity after each epoch: mean over subspaces, and their range."""
    return _epochs(history.epochs_T, history.perplexity_TM, best_epoch, "perplexity", is_share=False)


def _epochs(
    epochs_T: NDArray[np.int64], numbers_TM: NDArray[np.float64], best_epoch: int | None, label: str, *, is_share: bool
) -> Markup:
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0] if is_share else charts.round_ticks(float(np.nanmax(numbers_TM, initial=1.0)))
    first, last = int(epochs_T[0]), int(epochs_T[-1])
    scales = charts.Scales(
        x=(float(first), float(max(last, first + 1))),
        y=(0.0, ticks[-1]),
        x_title="epoch",
        y_ticks=[(tick, percent(tick) if is_share else f"{tick:,g}") for tick in ticks],
        x_ticks=charts.whole_ticks(first, last),
    )
    lows, means, highs = numbers_TM.min(1), numbers_TM.mean(1), numbers_TM.max(1)
    tips = [
        f"epoch {epoch}: " + (percent(mean) if is_share else f"{mean:.1f}")
        for epoch, mean in zip(epochs_T.tolist(), means.tolist(), strict=True)
    ]
    best = []
    if best_epoch is not None and first <= best_epoch <= last:
        best.append(charts.upright(scales, best_epoch, "this artifact"))
    return charts.chart(
        scales,
        label,
        charts.band(scales, epochs_T, lows, highs),
        *best,
        charts.line(scales, epochs_T, means, tips),
    )


# Codes side by side


def code_strip(codes_M: NDArray[np.uint16], chosen_M: NDArray[np.uint16], num_codes: int) -> Markup:
    """A row's codes, coloured where they are the chosen row's; numbers where there is room (DPQ paper, table 8)."""
    same_M = same_codes(codes_M, chosen_M)
    cell = 7 * len(str(num_codes - 1)) + 6
    if len(codes_M) * cell > _MOST_STRIP:
        cells = [_plain_cells(same_M)]
        cell, width = 1, min(_MOST_STRIP, 5 * len(codes_M))
        box, class_ = f"0 0 {len(codes_M)} 1", "strip plain"
    else:
        cells = [_cell(m, cell, int(code), same=bool(same_M[m])) for m, code in enumerate(codes_M)]
        width, box, class_ = cell * len(codes_M), f"0 0 {cell * len(codes_M)} 18", "strip"
    label = f"{int(same_M.sum())} of {len(codes_M)} codes are the same: {' '.join(map(str, codes_M.tolist()))}"
    ratio = None if class_ == "strip" else "none"
    style = f"max-width:{width}px"
    return element(
        "svg", *cells, viewBox=box, preserveAspectRatio=ratio, role="img", aria_label=label, style=style, class_=class_
    )


def same_codes(codes_M: NDArray[np.uint16], chosen_M: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Which of a row's codes [M] are the chosen row's, which may have fewer levels or more."""
    both = min(len(codes_M), len(chosen_M))
    return np.pad(codes_M[:both] == chosen_M[:both], (0, len(codes_M) - both))


def _cell(m: int, width: int, code: int, *, same: bool) -> Markup:
    kind = "same" if same else "other"
    return join(
        [
            element("rect", x=m * width + 0.5, y=0.5, width=width - 1, height=17, class_=kind),
            element("text", f"{code}", x=m * width + width / 2, y=13, text_anchor="middle", class_=kind),
        ]
    )


def _plain_cells(same_M: NDArray[np.bool_]) -> Markup:
    runs = " ".join(f"M{m} 0h1v1h-1z" for m in np.flatnonzero(same_M).tolist())
    return join([element("rect", width=len(same_M), height=1, class_="other"), element("path", d=runs, class_="same")])
