"""What the page says of one table: bytes, use of codes, rank, history, neighbours. In: facts. Out: Markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dpq_rec.report import figures
from dpq_rec.report.facts import CANDIDATES, CodeUse, Member, TableFacts
from dpq_rec.report.history import CodeHistory, RunHistory
from dpq_rec.report.markup import Markup, byte_text, element, from_data, join, percent, shortened
from dpq_rec.report.names import Id


def section(facts: TableFacts, run: RunHistory | None, titles: Mapping[Id, str]) -> Markup:
    """All that is shown of a table.

    Args:
        facts: of it.
        run: that left the artifact, where it is known.
        titles: of its ids, where they are known.
    """
    table, manifest = facts.table, facts.table.manifest
    pairs: list[tuple[object, object]] = [("kind", manifest.kind), ("rows", f"{manifest.num_embeddings:,}")]
    pairs.append(("E", f"{manifest.embedding_dim:,}"))
    if manifest.has_codes:
        pairs.extend([("D", manifest.num_subspaces), ("L", table.shown_levels), ("K", f"{manifest.num_codes:,}")])
        values = f"{table.tensors['values'].dtype}{', shared' if manifest.shared_values else ''}"
        pairs.extend([("bits a code", manifest.code_bits), ("values", values)])
    pairs.extend(
        [
            ("bytes a row", table.shown_row_bytes),
            ("vocabulary", table.vocabulary.kind),
        ]
    )
    parts = [element("h2", table.name), chips(pairs), _bytes(facts)]
    history = None if run is None else run.codes.get(table.name)
    if facts.code_use is not None:
        parts.append(_code_use(facts, facts.code_use))
    parts.append(element("div", _rank(facts), *_history(history, run), class_="pair"))
    parts.append(_neighbours(facts, titles))
    return element("section", *parts, id=table.name)


def _bytes(facts: TableFacts) -> Markup:
    table, parts = facts.table, facts.byte_parts
    total = sum(parts.values())
    keys = [
        element(
            "li",
            element("i", class_=figures.PART_CLASSES[what]),
            f"{what} ",
            element("b", byte_text(num_bytes)),
            element("span", f" {percent(num_bytes / total)}"),
        )
        for what, num_bytes in parts.items()
    ]
    text = f"{table.artifact_bytes:,} bytes of vectors in a file of {total:,}."
    if table.manifest.has_codes:
        text = (
            f"A compression ratio of {table.compression_ratio:.1f}: {table.full_bytes:,} bytes as fp32, "
            f"{table.artifact_bytes:,} of codes and values in a file of {total:,}, which is drawn to scale and, below "
            "that, enlarged."
        )
    return join(
        [
            element("h3", "Bytes"),
            element("p", text, class_="note"),
            figures.byte_bars(parts, table.full_bytes, enlarged=table.manifest.has_codes),
            element("ul", *keys, class_="keys"),
        ]
    )


def _code_use(facts: TableFacts, use: CodeUse) -> Markup:
    table, layout = facts.table, facts.table.manifest.layout
    unused, bits = int((use.counts_MK == 0).sum()), facts.table.manifest.code_bits
    entropy_bits = sum(map(math.log2, use.perplexity_M.tolist()))
    of_row = "a row" if len(table.tiers) == 1 else "a row that has all levels"
    text = (
        f"{unused:,} of {use.counts_MK.size:,} codes ({percent(unused / use.counts_MK.size)}) are used by no row. "
        f"Perplexity is K = {layout.num_codes:,} where all are used alike and 1 where every row has the same one; here "
        f"{use.perplexity_M.min():,.1f} to {use.perplexity_M.max():,.1f}, {use.perplexity_M.mean():,.1f} in the mean. "
        f"Each by itself, the codes of {of_row} carry {entropy_bits:,.1f} bits of {layout.codes_per_row * bits:,} "
        "stored."
    )
    scale = [
        element(
            "div",
            element("svg", element("rect", width=62, height=12, class_=f"u{at}"), aria_hidden="true", class_="heat"),
            step,
        )
        for at, step in enumerate(figures.USE_STEPS)
    ]
    label = "rows of a code, as a multiple of V / K:"
    return join(
        [
            element("h3", "Use of codes"),
            element("p", text, class_="note"),
            figures.heat_map(use, layout),
            element("div", element("span", label), *scale, class_="scale"),
        ]
    )


def _rank(facts: TableFacts) -> Markup:
    manifest, found = facts.table.manifest, facts.spectrum
    head = element("h3", "Rank")
    if found is None:
        return element("div", head, element("p", "A decoded number is not finite: no rank.", class_="note"))
    if not len(found.singular_values_R) or not found.singular_values_R[0]:
        return element("div", head, element("p", "There is no row that is not zero: rank 0.", class_="note"))
    rows = (
        f"all {found.num_rows:,} rows"
        if found.num_rows == manifest.num_embeddings
        else f"a sample of {found.num_rows:,} of {manifest.num_embeddings:,} rows, spread evenly"
    )
    text = (
        f"{found.rank} of {most_rank(facts)}: singular values above {found.tolerance:.1g} of the largest, of {rows}. "
        f"{found.directions_of(0.9)} directions hold {percent(0.9)} of the squared length, {found.directions_of(0.99)} "
        f"hold {percent(0.99)}."
    )
    use = facts.code_use
    if use is not None:
        used, most = int((use.counts_MK > 0).sum()), use.most_rank(manifest.embedding_dim)
        text += f" Theorem 1 asks for K\u00b7D \u2265 E; the {used:,} codes in use allow a rank of {most:,}."
    figure = figures.spectrum_curve(found)
    return element("div", head, element("p", text, class_="note"), figure)


def _history(history: CodeHistory | None, run: RunHistory | None) -> list[Markup]:
    if history is None or run is None:
        return []
    last = history.changed_TM[-1].mean()
    end = "" if math.isnan(last) else f" In the last epoch {percent(float(last))} changed."
    changed = f"Share of codes that differ from the epoch before: mean over subspaces, and their range.{end}"
    return [
        element(
            "div",
            element("h3", "Codes that changed"),
            element("p", changed, class_="note"),
            figures.changed_curve(history, run.best_epoch),
        ),
        element(
            "div",
            element("h3", "Perplexity while training"),
            element("p", "After each epoch: mean over subspaces, and their range.", class_="note"),
            figures.perplexity_curve(history, run.best_epoch),
        ),
    ]


# Neighbours, and their codes


def _neighbours(facts: TableFacts, titles: Mapping[Id, str]) -> Markup:
    parts: list[Markup] = [element("h3", "Nearest neighbours")]
    text = "The rows with the highest cosine of decoded vectors, among all rows of the table."
    if facts.code_use is not None:
        shared, total = float(facts.code_use.agreement_M.sum()), len(facts.code_use.agreement_M)
        text = (
            f"{text} Their codes stand beside them, coloured where they are the chosen row's; two rows at random share "
            f"{shared:.1f} of {total}."
        )
    if not facts.are_chosen_by_caller:
        text += (
            f" Chosen among the first {CANDIDATES} rows, where training puts the most frequent ids, leaving out those "
            "much alike; --ids chooses others."
        )
    parts.append(element("p", text, class_="note"))
    if facts.missing:
        listed = [piece for an_id in facts.missing for piece in (", ", from_data(an_id))][1:]
        parts.append(element("p", "Not in the vocabulary: ", *listed, "."))
    lists = [_neighbourhood(facts, members, titles) for members in facts.neighbourhoods]
    return join(
        [*parts, *lists] if facts.code_use is not None else [*parts, element("div", *lists, class_="plain-lists")]
    )


def _neighbourhood(facts: TableFacts, members: Sequence[Member], titles: Mapping[Id, str]) -> Markup:
    has_codes = facts.code_use is not None
    heads = [element("th", ""), element("th", "cosine", class_="number")]
    if has_codes:
        num_codes = facts.table.manifest.layout.codes_per_row
        heads += [
            element("th", "shared", class_="number"),
            element("th", f"{num_codes} codes" if num_codes > 1 else "code"),
        ]
    lines = [element("tr", *heads, class_="heads")]
    for at, member in enumerate(members):
        cells = [element("td", _name(member, titles), class_="name", title=_title(member, titles))]
        cells.append(element("td", "" if at == 0 else f"{member.cosine:.3f}", class_="number"))
        if member.codes_M is not None and members[0].codes_M is not None:
            same = int(figures.same_codes(member.codes_M, members[0].codes_M).sum())
            strip = figures.code_strip(member.codes_M, members[0].codes_M, facts.table.manifest.num_codes)
            cells.append(element("td", "" if at == 0 else f"{same}", class_="number"))
            cells.append(element("td", strip, class_="codes"))
        lines.append(element("tr", *cells, class_="chosen" if at == 0 else None))
    return element("table", element("tbody", *lines), class_="near coded" if has_codes else "near")


def _title(member: Member, titles: Mapping[Id, str]) -> str | None:
    """The whole of a title, which may be cut to fit its column."""
    return shortened(titles[member.id]) if member.id is not None and member.id in titles else None


def _name(member: Member, titles: Mapping[Id, str]) -> Markup:
    if member.id is None:
        return join([f"row {member.row:,}", element("span", " (no id lives here)", class_="id")])
    more = f" and {member.num_ids - 1:,} more" if member.num_ids > 1 else ""
    if member.id in titles:
        return join([from_data(titles[member.id]), element("span", " ", from_data(member.id), more, class_="id")])
    shown = from_data(member.id) if member.id != "" else Markup("\u201c\u201d")
    return join([shown, element("span", more, class_="id")])


# What the page's head says too


def chips(pairs: Sequence[tuple[object, object]]) -> Markup:
    """Names and what they stand for, in a row."""
    return element("ul", *(element("li", name, " ", element("b", value)) for name, value in pairs), class_="chips")


def most_rank(facts: TableFacts) -> int:
    """The rank that the table's shape allows."""
    return min(facts.table.manifest.num_embeddings, facts.table.manifest.embedding_dim)
