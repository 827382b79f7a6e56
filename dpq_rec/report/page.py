"""The page. In: an artifact and the facts of its tables. Out: one HTML document, without scripts or other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dpq_rec.artifact import Artifact
from dpq_rec.report.facts import TableFacts
from dpq_rec.report.history import RunHistory
from dpq_rec.report.markup import Markup, byte_text, element, from_data, percent
from dpq_rec.report.names import Id, Names
from dpq_rec.report.section import chips, most_rank, section
from dpq_rec.report.style import STYLE
from dpq_rec.table import sizes

# Forbids scripts and everything from elsewhere, should a way be found to smuggle it in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_NONE = "\u2013"  # where a table has no such number


def page(
    artifact: Artifact,
    tables: Sequence[TableFacts],
    run: RunHistory | None,
    names: Names | None,
    titles: Mapping[Id, str],
) -> str:
    """The whole document.

    Args:
        artifact: what the report is on.
        tables: its tables.
        run: that left it, where it is known.
        names: the file that titles came from.
        titles: of ids of that file's table.
    """
    title = f"{artifact.path.name}, version {artifact.version}"
    head = [
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", title),
        element("style", Markup(STYLE)),
    ]
    sections = [
        section(facts, run, titles if names is not None and names.table == facts.table.name else {}) for facts in tables
    ]
    body = element(
        "main",
        _heading(artifact, run),
        _tiles(artifact),
        _overview(artifact, tables),
        *sections,
        _foot(artifact, names),
    )
    document = element("html", element("head", *head), element("body", body), lang="en")
    return f"<!DOCTYPE html>\n{document}\n"


def _heading(artifact: Artifact, run: RunHistory | None) -> Markup:
    lines = [
        element("h1", "Compressed embedding tables"),
        element(
            "p",
            *("version ", from_data(artifact.version), ", made ", from_data(artifact.created_at), " by "),
            *(from_data(artifact.producer), ", in ", from_data(artifact.path)),
            class_="note",
        ),
    ]
    if run is not None:
        known = [("recipe", run.recipe), ("embedding", run.embedding), ("seed", run.seed)]
        pairs: list[tuple[object, object]] = [(name, from_data(value)) for name, value in known if value is not None]
        if run.best_epoch is not None:
            pairs.append(("epoch", f"{run.best_epoch} of {run.num_epochs}"))
        pairs.extend((from_data(name), f"{value:.4f}") for name, value in run.metrics.items())
        lines.append(chips(pairs))
    return element("header", *lines)


def _tiles(artifact: Artifact) -> Markup:
    total = sizes(artifact.tables.values())
    codes = any(table.manifest.has_codes for table in artifact.tables.values())
    tiles = [
        (f"{total['compression_ratio']:.1f}\u00d7", "compression ratio", "tile first"),
        (byte_text(total["artifact_bytes"]), "codes and values" if codes else "vectors", "tile"),
        (byte_text(total["full_bytes"]), "the same as fp32", "tile"),
        (byte_text(total["vocabulary_bytes"]), "vocabularies, not in the ratio", "tile"),
        (
            f"{total['num_embeddings']:,}",
            f"rows in {len(artifact.tables)} {'table' if len(artifact.tables) == 1 else 'tables'}",
            "tile",
        ),
    ]
    return element(
        "div",
        *(element("div", element("b", n), element("span", what), class_=c) for n, what, c in tiles),
        class_="tiles",
    )


_HEADINGS = (
    *("table", "rows", "E", "D", "L", "K", "bytes a row", "on disk", "vocabulary", "as fp32", "ratio"),
    *("mean perplexity", "unused codes", "rank"),
)


def _overview(artifact: Artifact, tables: Sequence[TableFacts]) -> Markup:
    lines = [element("tr", *(element("td", cell) for cell in _overview_cells(facts))) for facts in tables]
    total = sizes(artifact.tables.values())
    cells = ("total", f"{total['num_embeddings']:,}", *[""] * 5, *_size_cells(total), *[""] * 3)
    lines.append(element("tr", *(element("td", cell) for cell in cells), class_="total"))
    head = element("tr", *(element("th", heading) for heading in _HEADINGS))
    return element(
        "section",
        element("h2", "All tables"),
        element(
            "div", element("table", element("thead", head), element("tbody", *lines), class_="list"), class_="scroll"
        ),
        element(
            "p",
            "E numbers a vector; D codes a row for each of L levels, each one of K. On disk: codes and values, or "
            "vectors where dense; ratio: as fp32 / on disk, the vocabulary apart.",
            class_="note",
        ),
    )


def _overview_cells(facts: TableFacts) -> tuple[object, ...]:
    manifest, use = facts.table.manifest, facts.code_use
    layout, used = [_NONE] * 3, [_NONE] * 2
    if use is not None:
        layout = [f"{manifest.num_subspaces:,}", facts.table.shown_levels, f"{manifest.num_codes:,}"]
        used = [f"{use.perplexity_M.mean():,.1f}", percent(float((use.counts_MK == 0).mean()))]
    return (
        element("a", facts.table.name, href=f"#{facts.table.name}"),
        f"{manifest.num_embeddings:,}",
        f"{manifest.embedding_dim:,}",
        *layout,
        facts.table.shown_row_bytes,
        *_size_cells(sizes([facts.table])),
        *used,
        _NONE if facts.spectrum is None else f"{facts.spectrum.rank} of {most_rank(facts)}",
    )


def _size_cells(found: Mapping[str, int | float]) -> tuple[str, ...]:
    counts = (byte_text(int(found[name])) for name in ("artifact_bytes", "vocabulary_bytes", "full_bytes"))
    return (*counts, f"{found['compression_ratio']:.1f}")


def _foot(artifact: Artifact, names: Names | None) -> Markup:
    parts: list[object] = [f"dpq-rec inspect {artifact.path} --report"]
    if names is not None:
        parts = ["Titles from ", from_data(names.path.name), ", column ", from_data(names.title_column), ". ", *parts]
    return element("footer", *parts)
