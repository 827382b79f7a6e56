"""HTML and SVG that cannot be broken by what stands in it. In: text and numbers. Out: Markup.

Whatever is not Markup is text: it is escaped when it becomes part of an element, so that an id or a title that holds
`<script>` is shown and never run.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_MOST_SHOWN = 120  # characters of a text that comes from data


class Markup(str):
    """Text that is HTML already."""


def element(tag: str, *parts: object, **attributes: object) -> Markup:
    """An element.

    Args:
        tag: its name.
        parts: what is in it, in order: Markup as it is, all else as escaped text.
        attributes: by name; a trailing `_` is dropped (`class_`), others become `-`; one of None is left out, numbers
            are written with two decimals at most.
    """
    inside = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{inside}>{join(parts)}</{tag}>")


def join(parts: Iterable[object]) -> Markup:
    """Parts one behind the other: Markup as it is, all else as escaped text."""
    return Markup("".join(part if isinstance(part, Markup) else escape(str(part)) for part in parts))


def escape(text: str) -> Markup:
    """Text as HTML shows it; characters that no page can hold become U+FFFD."""
    return Markup(html.escape(_UNSHOWABLE.sub("\ufffd", text)))


def from_data(text: object) -> Markup:
    """A name, title or id: cut where it is very long, and kept from turning round the text beside it (bidi)."""
    return element("bdi", shortened(str(text)))


def shortened(text: str) -> str:
    """A text, cut where it is very long."""
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}\u2026"


def _attribute(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


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
