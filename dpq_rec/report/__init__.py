"""An artifact as a web page. In: an artifact, perhaps titles and a run's history. Out: one HTML file.

`facts` measures, `page` says what was found and draws it by `charts`; `names` reads titles of ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpq_rec.artifact import Artifact
from dpq_rec.errors import ConfigError, UnknownTableError
from dpq_rec.files import replace_file
from dpq_rec.report.facts import Id, Progress, RunHistory, measure
from dpq_rec.report.names import Names
from dpq_rec.report.page import page


class Reported(NamedTuple):
    """What was shown.

    Attributes:
        num_ids: ids that are shown of the table that has titles; 0 without titles.
        num_titles: how many of them have one.
        missing: ids to be shown that are not in the vocabulary.
    """

    num_ids: int
    num_titles: int
    missing: Sequence[Id]


def num_report_steps(artifact: Artifact) -> int:
    """How many rows `write_report` tells its progress, in all: it passes twice over those that have codes."""
    manifests = [table.manifest for table in artifact.tables.values()]
    return sum(manifest.num_embeddings * (2 if manifest.has_codes else 1) for manifest in manifests)


def write_report(
    artifact: Artifact,
    out: Path,
    *,
    names: Path | None = None,
    ids: Sequence[str] = (),
    table: str | None = None,
    run: RunHistory | None = None,
    progress: Progress = lambda num_rows: None,
) -> Reported:
    """Write the page; on any error nothing is left behind.

    Args:
        artifact: an opened artifact.
        out: the file to make; it must not exist.
        names: a Parquet, CSV or TSV file with titles of a table's ids.
        ids: whose neighbours are shown, as text; if there are none, telling ones are found.
        table: whose ids these are; None finds it where it can be told.
        run: the training run that left the artifact, where it is known.
        progress: called with the number of rows of each block that was looked at.

    Raises:
        ConfigError, UnknownTableError, IdTypeError: names, ids, table or run make no sense.
        DamagedArtifactError: a row's codes are not what was published.
        FileExistsError: `out` exists.
        MissingDependencyError: names are Parquet, and pyarrow is not installed.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; name another file, or remove it")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder; make it, or name a file elsewhere")
    if table is not None and table not in artifact.tables:
        raise UnknownTableError(table, artifact.tables)
    file = None if names is None else Names(names, artifact.tables, table)
    titled = None if file is None else file.table
    chosen = _chosen_ids(artifact, ids, table or titled)
    order = sorted(artifact.tables, key=lambda name: titled is None or name != titled)  # the one with titles first
    tables = [measure(artifact.tables[name], chosen.get(name, ()), progress) for name in order]
    shown = {an_id for facts in tables if facts.table.name == titled for an_id in facts.shown_ids}
    titles = {} if file is None else file.titles_of(shown)
    replace_file(out, page(artifact, tables, run, file, titles))
    return Reported(len(shown), len(titles), [an_id for facts in tables for an_id in facts.missing])


def _chosen_ids(artifact: Artifact, ids: Sequence[str], name: str | None) -> dict[str, Sequence[Id]]:
    """Table -> ids, of the type that its vocabulary has."""
    if not ids:
        return {}
    if name is None and len(artifact.tables) == 1:
        name = next(iter(artifact.tables))
    if name is None:
        listed = ", ".join(artifact.tables)
        raise ConfigError(f"--ids: this artifact has the tables {listed}; say whose ids they are with --table")
    return {name: artifact.tables[name].ids_of_texts(ids)}
