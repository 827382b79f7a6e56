"""The page. In: an artifact and the facts of its tables. Out: one HTML document, without scripts or other files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from dpq_rec.artifact import Artifact
from dpq_rec.report import charts
from dpq_rec.report.charts import Markup, byte_text, fill, join, percent
from dpq_rec.report.facts import CANDIDATES, CodeHistory, CodeUse, Id, Member, RunHistory, TableFacts
from dpq_rec.table import sizes

if TYPE_CHECKING:
    from dpq_rec.report.names import Names

_MOST_SHOWN = 120  # characters of a text that comes from data
_NONE = "\u2013"  # where a table has no such number
_HEADINGS = (
    *("table", "rows", "E", "D", "L", "K", "bytes a row", "on disk", "vocabulary", "as fp32", "ratio"),
    *("mean perplexity", "unused codes", "rank"),
)
# The policy forbids scripts and everything from elsewhere, should a way be found to smuggle it in.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name}, version {artifact.version}</title>
<style>
{style}</style>
</head>
<body><main>
<header><h1>Compressed embedding tables</h1>
<p class="note">version {version}, made {created_at} by {producer}, in {path}</p>{run}</header>
<div class="tiles">{tiles}</div>
<section><h2>All tables</h2>
<div class="scroll"><table class="list"><thead><tr>{headings}</tr></thead><tbody>{lines}</tbody></table></div>
<p class="note">E numbers a vector; D codes a row for each of L levels, each one of K. On disk: codes and values, or \
vectors where dense; ratio: as fp32 / on disk, the vocabulary apart.</p>
</section>
{sections}
<footer>{titles}dpq-rec inspect {artifact.path} --report</footer>
</main></body>
</html>
"""


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
    from_names = Markup("")
    if names is not None:
        path, column = from_data(names.path.name), from_data(names.title_column)
        from_names = fill("Titles from {}, column {}. ", path, column)
    return fill(
        _PAGE,
        artifact=artifact,
        name=artifact.path.name,
        style=Markup((files(__package__) / "style.css").read_text(encoding="utf-8")),
        version=from_data(artifact.version),
        created_at=from_data(artifact.created_at),
        producer=from_data(artifact.producer),
        path=from_data(artifact.path),
        run=_run_chips(run) if run is not None else Markup(""),
        tiles=_tiles(artifact),
        headings=join(_HEADINGS, "<th>{}</th>"),
        lines=_overview(artifact, tables),
        sections=join(
            _section(facts, run, titles if names is not None and names.table == facts.table.name else {})
            for facts in tables
        ),
        titles=from_names,
    )


def from_data(text: object) -> Markup:
    """A name, title or id: cut where it is very long, and kept from turning round the text beside it (bidi)."""
    return fill("<bdi>{}</bdi>", shortened(str(text)))


def shortened(text: str) -> str:
    """A text, cut where it is very long."""
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}\u2026"


def _chips(pairs: Iterable[tuple[object, object]]) -> Markup:
    """Names and what they stand for, in a row."""
    return fill('<ul class="chips">{}</ul>', join(fill("<li>{} <b>{}</b></li>", *pair) for pair in pairs))


def _run_chips(run: RunHistory) -> Markup:
    pairs = [(name, from_data(value)) for name, value in run.about.items()]
    return _chips([*pairs, *((from_data(name), f"{value:.4f}") for name, value in run.metrics.items())])


def _tiles(artifact: Artifact) -> Markup:
    total = sizes(artifact.tables.values())
    codes = any(table.manifest.has_codes for table in artifact.tables.values())
    tiles = {
        "compression ratio": f"{total['compression_ratio']:.1f}\u00d7",
        "codes and values" if codes else "vectors": byte_text(total["artifact_bytes"]),
        "the same as fp32": byte_text(total["full_bytes"]),
        "vocabularies, not in the ratio": byte_text(total["vocabulary_bytes"]),
        f"rows in {len(artifact.tables)} table{'s' * (len(artifact.tables) != 1)}": f"{total['num_embeddings']:,}",
    }
    tile = '<div class="tile{}"><b>{}</b><span>{}</span></div>'
    return join(fill(tile, "" if at else " first", n, what) for at, (what, n) in enumerate(tiles.items()))


def _overview(artifact: Artifact, tables: Sequence[TableFacts]) -> Markup:
    total = sizes(artifact.tables.values())
    cells = ("total", f"{total['num_embeddings']:,}", *[""] * 5, *_size_cells(total), *[""] * 3)
    lines = [fill("<tr>{}</tr>", join(_overview_cells(facts), "<td>{}</td>")) for facts in tables]
    return join([*lines, fill('<tr class="total">{}</tr>', join(cells, "<td>{}</td>"))])


def _overview_cells(facts: TableFacts) -> tuple[object, ...]:
    manifest, use = facts.table.manifest, facts.code_use
    layout, used = [_NONE] * 3, [_NONE] * 2
    if use is not None:
        layout = [f"{manifest.num_subspaces:,}", facts.table.shown_levels, f"{manifest.num_codes:,}"]
        used = [f"{use.perplexity_M.mean():,.1f}", percent(float((use.counts_MK == 0).mean()))]
    return (
        fill('<a href="#{0}">{0}</a>', facts.table.name),
        f"{manifest.num_embeddings:,}",
        f"{manifest.embedding_dim:,}",
        *layout,
        facts.table.shown_row_bytes,
        *_size_cells(sizes([facts.table])),
        *used,
        _NONE if facts.spectrum is None else f"{facts.spectrum.rank} of {_most_rank(facts)}",
    )


def _size_cells(found: Mapping[str, int | float]) -> tuple[str, ...]:
    counts = (byte_text(int(found[name])) for name in ("artifact_bytes", "vocabulary_bytes", "full_bytes"))
    return (*counts, f"{found['compression_ratio']:.1f}")


def _most_rank(facts: TableFacts) -> int:
    """The rank that the table's shape allows."""
    return min(facts.table.manifest.num_embeddings, facts.table.manifest.embedding_dim)


# One table


def _section(facts: TableFacts, run: RunHistory | None, titles: Mapping[Id, str]) -> Markup:
    table, manifest = facts.table, facts.table.manifest
    pairs = {"kind": manifest.kind, "rows": f"{manifest.num_embeddings:,}", "E": f"{manifest.embedding_dim:,}"}
    if manifest.has_codes:
        pairs |= {"D": f"{manifest.num_subspaces}", "L": table.shown_levels, "K": f"{manifest.num_codes:,}"}
        values = f"{table.tensors['values'].dtype}{', shared' if manifest.shared_values else ''}"
        pairs |= {"bits a code": f"{manifest.code_bits}", "values": values}
    pairs["bytes a row"] = table.shown_row_bytes
    pairs["vocabulary"] = table.vocabulary.kind
    history = None if run is None else run.codes.get(table.name)
    return fill(
        '<section id="{0}"><h2>{0}</h2>{1}{2}{3}<div class="pair"><div>{4}</div>{5}</div>{6}</section>\n',
        table.name,
        _chips(pairs.items()),
        _bytes(facts),
        _code_use(facts, facts.code_use) if facts.code_use is not None else Markup(""),
        _rank(facts),
        _history(history, run.best_epoch) if run is not None and history is not None else Markup(""),
        _neighbours(facts, titles),
    )


def _titled(heading: str, text: str, *figures: Markup) -> Markup:
    return fill('<h3>{}</h3><p class="note">{}</p>{}', heading, text, join(figures))


def _bytes(facts: TableFacts) -> Markup:
    table, parts = facts.table, facts.byte_parts
    total = sum(parts.values())
    text = f"{table.artifact_bytes:,} bytes of vectors in a file of {total:,}."
    if table.manifest.has_codes:
        text = (
            f"A compression ratio of {table.compression_ratio:.1f}: {table.full_bytes:,} bytes as fp32, "
            f"{table.artifact_bytes:,} of codes and values in a file of {total:,}, which is drawn to scale and, below "
            "that, enlarged."
        )
    key = '<li><i class="{}"></i>{} <b>{}</b><span> {}</span></li>'
    keys = join(
        fill(key, charts.PART_CLASSES[what], what, byte_text(num_bytes), percent(num_bytes / total))
        for what, num_bytes in parts.items()
    )
    bars = charts.byte_bars(parts, table.full_bytes, enlarged=table.manifest.has_codes)
    return _titled("Bytes", text, bars, fill('<ul class="keys">{}</ul>', keys))


def _code_use(facts: TableFacts, use: CodeUse) -> Markup:
    layout = facts.table.manifest.layout
    unused, num_bits = int((use.counts_MK == 0).sum()), layout.codes_per_row * facts.table.manifest.code_bits
    entropy_bits = sum(map(math.log2, use.perplexity_M.tolist()))
    of_row = "a row" if len(facts.table.tiers) == 1 else "a row that has all levels"
    text = (
        f"{unused:,} of {use.counts_MK.size:,} codes ({percent(unused / use.counts_MK.size)}) are used by no row. "
        f"Perplexity is K = {layout.num_codes:,} where all are used alike and 1 where every row has the same one; here "
        f"{use.perplexity_M.min():,.1f} to {use.perplexity_M.max():,.1f}, {use.perplexity_M.mean():,.1f} in the mean. "
        f"Each by itself, the codes of {of_row} carry {entropy_bits:,.1f} bits of {num_bits:,} stored."
    )
    step = '<div><svg aria-hidden="true" class="heat"><rect width="62" height="12" class="u{}"></rect></svg>{}</div>'
    steps = join(fill(step, *numbered) for numbered in enumerate(charts.USE_STEPS))
    scale = fill('<div class="scale"><span>rows of a code, as a multiple of V / K:</span>{}</div>', steps)
    return _titled("Use of codes", text, charts.heat_map(use, layout), scale)


def _rank(facts: TableFacts) -> Markup:
    manifest, found, use = facts.table.manifest, facts.spectrum, facts.code_use
    if found is None:
        return _titled("Rank", "A decoded number is not finite: no rank.")
    if not len(found.singular_values_R) or not found.singular_values_R[0]:
        return _titled("Rank", "There is no row that is not zero: rank 0.")
    rows = f"all {found.num_rows:,} rows"
    if found.num_rows != manifest.num_embeddings:
        rows = f"a sample of {found.num_rows:,} of {manifest.num_embeddings:,} rows, spread evenly"
    text = (
        f"{found.rank} of {_most_rank(facts)}: singular values above {found.tolerance:.1g} of the largest, of {rows}. "
        f"{found.directions_of(0.9)} directions hold {percent(0.9)} of the squared length, {found.directions_of(0.99)} "
        f"hold {percent(0.99)}."
    )
    if use is not None:
        used, most = int((use.counts_MK > 0).sum()), use.most_rank(manifest.embedding_dim)
        text += f" Theorem 1 asks for K·D ≥ E; the {used:,} codes in use allow a rank of {most:,}."
    return _titled("Rank", text, charts.spectrum_curve(found))


def _history(history: CodeHistory, best_epoch: int | None) -> Markup:
    last = float(history.changed_TM[-1].mean())
    changed = "Share of codes that differ from the epoch before: mean over subspaces, and their range."
    if not math.isnan(last):
        changed += f" In the last epoch {percent(last)} changed."
    perplexity = "After each epoch: mean over subspaces, and their range."
    curves = charts.history_curves(history, best_epoch)
    texts = {"Codes that changed": changed, "Perplexity while training": perplexity}
    return join(map(_titled, texts, texts.values(), curves), "<div>{}</div>")


def _neighbours(facts: TableFacts, titles: Mapping[Id, str]) -> Markup:
    text = "The rows with the highest cosine of decoded vectors, among all rows of the table."
    if facts.code_use is not None:
        shared, total = float(facts.code_use.agreement_M.sum()), len(facts.code_use.agreement_M)
        text += (
            f" Their codes stand beside them, coloured where they are the chosen row's; two rows at random share "
            f"{shared:.1f} of {total}."
        )
    if not facts.are_chosen_by_caller:
        text += (
            f" Chosen among the first {CANDIDATES} rows, where training puts the most frequent ids, leaving out those "
            "much alike; --ids chooses others."
        )
    lists = join(_neighbourhood(facts, members, titles) for members in facts.neighbourhoods)
    if facts.code_use is None:
        lists = fill('<div class="plain-lists">{}</div>', lists)
    missing = Markup(", ".join(map(from_data, facts.missing)))
    if missing:
        lists = fill("<p>Not in the vocabulary: {}.</p>{}", missing, lists)
    return _titled("Nearest neighbours", text, lists)


def _neighbourhood(facts: TableFacts, members: Sequence[Member], titles: Mapping[Id, str]) -> Markup:
    number, heads = '<td class="number">{}</td>', '<th></th><th class="number">cosine</th>'
    if facts.code_use is not None:
        num_codes = len(facts.code_use.agreement_M)
        heads += (
            f'<th class="number">shared</th><th>{num_codes} codes</th>'
            if num_codes > 1
            else ('<th class="number">shared</th><th>code</th>')
        )
    lines = []
    for at, member in enumerate(members):
        title = titles.get(member.id) if member.id is not None else None
        whole = Markup("") if title is None else fill(' title="{}"', shortened(title))  # it may be cut in its column
        cells = [fill('<td class="name"{}>{}</td>', whole, _name(member, title))]
        cells.append(fill(number, f"{member.cosine:.3f}" if at else ""))
        if member.codes_M is not None and members[0].codes_M is not None:
            same_M = charts.same_codes(member.codes_M, members[0].codes_M)
            strip = charts.code_strip(member.codes_M, members[0].codes_M, facts.table.manifest.num_codes)
            cells += [fill(number, f"{same_M.sum()}" if at else ""), fill('<td class="codes">{}</td>', strip)]
        lines.append(fill("<tr{}>{}</tr>", Markup("" if at else ' class="chosen"'), join(cells)))
    return fill(
        '<table class="near{}"><tbody><tr class="heads">{}</tr>{}</tbody></table>',
        "" if facts.code_use is None else " coded",
        Markup(heads),
        join(lines),
    )


def _name(member: Member, title: str | None) -> Markup:
    if member.id is None:
        return fill('row {:,}<span class="id"> (no id lives here)</span>', member.row)
    more = f" and {member.num_ids - 1:,} more" if member.num_ids > 1 else ""
    if title is not None:
        return fill('{}<span class="id"> {}{}</span>', from_data(title), from_data(member.id), more)
    shown = from_data(member.id) if member.id != "" else Markup("\u201c\u201d")
    return fill('{}<span class="id">{}</span>', shown, more)
