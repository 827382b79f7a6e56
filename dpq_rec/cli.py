"""The `dpq-rec` command. In: arguments. Out: text on stdout, errors as one line on stderr, an exit code.

Exit codes: 0; 1 a damaged artifact or a missing id; 2 usage: whatever another call would put right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpq_rec.artifact import Artifact, open_artifact, verify
from dpq_rec.errors import ConfigError, DamagedArtifactError, DpqRecError
from dpq_rec.export import ExportConfig, export_table
from dpq_rec.lookup import EmbeddingStore
from dpq_rec.publish import publish
from dpq_rec.report import num_report_steps, write_report
from dpq_rec.report.facts import CodeHistory, RunHistory
from dpq_rec.table import Table, sizes

OK, DAMAGED_OR_MISSING, USAGE = 0, 1, 2

_DESCRIPTION = "Look into, check, publish and export the compressed embedding tables that dpq_rec trains and serves."
_EXAMPLES = """\
ARTIFACT is the folder that a training run leaves (RUN/artifact), or a store of published versions.

examples:
  dpq-rec inspect run/artifact                               what is in it, and how much smaller it is
  dpq-rec inspect run/artifact --report out.html             the same as a page, with how its codes are used, and more
  dpq-rec verify run/artifact                                is every byte what was published?
  dpq-rec lookup run/artifact --table item_id 42 7 -1        the vectors of three ids, as JSON
  dpq-rec lookup run/artifact --table word -- the -ing       ids of a table of strings, one of which begins with "-"
  dpq-rec export run/artifact --table item_id --out vectors  Parquet files for Spark, DuckDB, pandas
  dpq-rec publish run/artifact store                         a new version for the servers that read the store

exit codes: 0; 1 a damaged artifact or a missing id; 2 usage
"""
_INSPECT_EXAMPLES = """\

  dpq-rec inspect run/artifact --report out.html
  dpq-rec inspect run/artifact --report out.html --names items.parquet --ids 42 7

The page shows bytes, the use of codes, the rank, nearest neighbours and their codes and, where the artifact lies in a
run's folder, how its codes changed while it was trained. It needs no other file and no network."""
_NAMES_HELP = "titles: .parquet, .csv or .tsv with a column called as the table (or id) and one called title or name"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is returned (argparse itself leaves with 2)."""
    try:
        try:
            return _run(_parser().parse_args(argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who reads, `head` say, has enough: end as tools do that the signal ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        return 128 + signal.SIGPIPE


def _run(arguments: argparse.Namespace) -> int:
    try:
        return int(arguments.run(arguments))
    except BrokenPipeError:
        raise
    except DamagedArtifactError as error:
        return _fail(f"{error}; get a sound copy: an artifact never changes once published", DAMAGED_OR_MISSING)
    except (DpqRecError, OSError) as error:
        return _fail(str(error), USAGE)


def _fail(message: str, code: int) -> int:
    print("dpq-rec:", " ".join(message.split()), file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("dpq-rec", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def command(run: Callable[[argparse.Namespace], int], name: str, summary: str, rest: str = "") -> Any:
        example = f"example:\n  dpq-rec {name} run/artifact {rest}"
        sub = commands.add_parser(name, help=summary, description=summary, epilog=example, formatter_class=layout)
        sub.add_argument("artifact", metavar="ARTIFACT", type=Path, help="an artifact's folder, or a store")
        sub.set_defaults(run=run)
        return sub

    sub = command(_export, "export", "write a table as Parquet files", "--table item_id --out vectors")
    sub.add_argument("--table", metavar="TABLE", required=True, help="`dpq-rec inspect` lists them")
    sub.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to make; it must not exist")
    sub.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the vectors (float32)")
    sub.add_argument("--codes", action="store_true", help="the codes of each row instead of its vector")

    sub = command(_inspect, "inspect", "list the tables of an artifact, or write a page on them", _INSPECT_EXAMPLES)
    shown = sub.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="as JSON, for programs")
    shown.add_argument("--report", metavar="HTML", type=Path, help="as a page to look at; the file must not exist")
    beside = sub.add_argument_group("beside --report")
    beside.add_argument("--names", metavar="FILE", type=Path, help=_NAMES_HELP)
    beside.add_argument(
        "--ids", metavar="ID", nargs="+", action="extend", help="whose neighbours to show (some of the most frequent)"
    )
    beside.add_argument("--table", metavar="TABLE", help="whose names and ids these are, where it cannot be told")
    beside.add_argument(
        "--run", dest="folder", metavar="DIR", type=Path, help="of the run that left ARTIFACT (where it lies in it)"
    )

    command(_verify, "verify", "read every byte: digests, codes, padding bits, vocabularies")

    sub = command(_lookup, "lookup", "print the vectors of ids, as the server's JSON", "--table item_id 42 7 -1")
    sub.add_argument("--table", metavar="TABLE", required=True, help="`dpq-rec inspect` lists them")
    sub.add_argument(
        "ids", metavar="ID", nargs="+", help="as the table's ids are; an unknown one: zeros and exit code 1"
    )

    sub = command(_publish, "publish", "verify, copy into a store, make it the store's current version", "store")
    sub.add_argument("store", metavar="STORE", type=Path, help="a folder of published versions; made if need be")
    return parser


@contextlib.contextmanager
def _progress_bar(total: int, unit: str, *, scale: bool = False) -> Iterator[Callable[[int], object]]:
    """A bar on stderr where that is a terminal and tqdm is installed; else nothing is shown."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda amount: None
        return
    with tqdm(total=total, unit=unit, unit_scale=True, unit_divisor=1024 if scale else 1000, disable=None) as bar:
        yield bar.update


# Commands


def _export(arguments: argparse.Namespace) -> int:
    table = EmbeddingStore.open(arguments.artifact).table(arguments.table)
    config = ExportConfig(dtype=arguments.dtype, codes=arguments.codes)
    with _progress_bar(table.manifest.num_embeddings, " rows") as progress:
        num_parts, num_ids = export_table(table, arguments.out, config, progress)
    print(f"{arguments.out}: {num_ids:,} ids in {num_parts:,} part(s)")
    return OK


def _lookup(arguments: argparse.Namespace) -> int:
    store = EmbeddingStore.open(arguments.artifact)
    vectors_NE, missing = store.lookup(arguments.table, store.table(arguments.table).ids_of_texts(arguments.ids))
    reply = {
        "table": arguments.table,
        "version": store.version,
        "dim": vectors_NE.shape[1],
        "vectors": [[_json_number(number) for number in vector_E] for vector_E in vectors_NE],
        "missing": missing.tolist(),
    }
    print(json.dumps(reply))
    return DAMAGED_OR_MISSING if len(missing) else OK


def _json_number(number: np.float32) -> float | None:
    """The shortest text that reads back as the same fp32 number: 0.1, not 0.10000000149. JSON has no NaN: null."""
    return float(str(number)) if np.isfinite(number) else None


def _publish(arguments: argparse.Namespace) -> int:
    print(f"{publish(arguments.artifact, arguments.store)} is the current version of {arguments.store}")
    return OK


def _verify(arguments: argparse.Namespace) -> int:
    artifact = open_artifact(arguments.artifact)
    tables = artifact.tables.values()
    packed_bytes = sum(table.packed_bytes for table in tables)
    with _progress_bar(sum(table.manifest.bytes for table in tables) + packed_bytes, "B", scale=True) as progress:
        verify(artifact.path, progress)
    for table in tables:
        checked = [f"sha256 of {table.manifest.bytes:,} bytes"]
        if table.manifest.has_codes:
            checked.append(f"codes and padding bits of {table.manifest.num_embeddings:,} rows")
        checked.append(f"{table.vocabulary.kind} vocabulary")
        print(f"{table.name}: {', '.join(checked)}")
    print(f"{artifact.path} is sound: version {artifact.version}, {len(tables)} table(s)")
    return OK


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.report is not None:
        return _report(arguments)
    beside = {"--names": arguments.names, "--ids": arguments.ids, "--table": arguments.table, "--run": arguments.folder}
    without_use = [flag for flag, value in beside.items() if value]
    if without_use:
        raise ConfigError(f"{', '.join(without_use)}: of use beside --report alone; add --report out.html")
    artifact = open_artifact(arguments.artifact)
    print(json.dumps(_as_json(artifact), indent=1) if arguments.json else _as_text(artifact))
    return OK


def _report(arguments: argparse.Namespace) -> int:
    artifact = open_artifact(arguments.artifact)
    folder = arguments.folder or find_run(artifact)
    run = None if folder is None else read_run(folder, artifact.tables)
    beside = {"names": arguments.names, "ids": arguments.ids or (), "table": arguments.table, "run": run}
    with _progress_bar(num_report_steps(artifact), " rows") as progress:
        reported = write_report(artifact, arguments.report, **beside, progress=progress)
    titles = f", titles of {reported.num_titles} of {reported.num_ids} ids" if arguments.names else ""
    print(f"{arguments.report}: {len(artifact.tables)} table(s){titles}")
    if reported.missing:
        print("not in the vocabulary:", ", ".join(map(str, reported.missing)))
    return DAMAGED_OR_MISSING if reported.missing else OK


# The training run that left an artifact: contract 2 says what it leaves beside it.


def find_run(artifact: Artifact) -> Path | None:
    """The folder of the run that left an artifact at RUN/artifact; None where it lies elsewhere."""
    folder = artifact.path.resolve()
    return folder.parent if folder.name == "artifact" and (folder.parent / "metrics.json").is_file() else None


def read_run(folder: Path, tables: Mapping[str, Table]) -> RunHistory:
    """What a run's metrics.json says, for the tables of its artifact.

    Raises:
        ConfigError: no metrics.json, one that is not a run's, or that of a run with other tables.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise ConfigError(f"--run: {folder} holds no {path.name}; name the folder of a run that has ended")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        epochs = found.get("history", [])
        codes = {
            name: _code_history([epoch for epoch in epochs if name in epoch["codes"]], name, table)
            for name, table in tables.items()
            if any(name in epoch.get("codes", {}) for epoch in epochs) and table.manifest.has_codes
        }
        best_epoch = None if found.get("best_epoch") is None else int(found["best_epoch"])
        about = {name: found.get(name) for name in ("recipe", "embedding", "seed")}
        about["epoch"] = None if best_epoch is None else f"{best_epoch} of {len(epochs)}"
        return RunHistory(
            about={name: value for name, value in about.items() if value is not None},
            metrics={str(name): float(value) for name, value in found.get("metrics", {}).items()},
            best_epoch=best_epoch,
            codes=codes,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"--run: {path} is not what the run that made this artifact writes ({wrong}); name that run's folder"
        ) from error


def _code_history(epochs: Sequence[Any], name: str, table: Table) -> CodeHistory:
    codes_per_row = table.manifest.layout.codes_per_row
    stats = [epoch["codes"][name] for epoch in epochs]
    nothing = [np.nan] * codes_per_row
    changed_TM = np.array([nothing if of["changed"] is None else of["changed"] for of in stats], np.float64)
    perplexity_TM = np.array([of["perplexity"] for of in stats], np.float64)
    for got_TM in (changed_TM, perplexity_TM):
        if got_TM.shape != (len(stats), codes_per_row):
            raise ValueError(f"table {name!r} had {got_TM.shape[1:]} codes a row, in this artifact {codes_per_row}")
    if not np.isfinite(perplexity_TM).all() or ((changed_TM < 0) | (changed_TM > 1)).any():
        raise ValueError(f"table {name!r}: want finite perplexities, and shares between 0 and 1")
    return CodeHistory(np.array([epoch["epoch"] for epoch in epochs], np.int64), changed_TM, perplexity_TM)


# What inspect prints


def _values_type(table: Table) -> str:
    return str(table.tensors["values" if table.manifest.has_codes else "vectors"].dtype)


def _as_json(artifact: Artifact) -> dict[str, Any]:
    tables = {
        name: {**table.manifest.as_dict(), "values_dtype": _values_type(table), **sizes([table])}
        for name, table in artifact.tables.items()
    }
    return {
        "path": str(artifact.path),
        "version": artifact.version,
        "created_at": artifact.created_at,
        "producer": artifact.producer,
        "tables": tables,
        "total": sizes(artifact.tables.values()),
    }


_HEADINGS = (
    *("table", "kind", "rows V", "dim E", "groups D", "levels L", "codes K", "bits", "row bytes", "values"),
    *("vocabulary", "bytes", "vocab. bytes", "full bytes", "ratio"),
)


def _as_text(artifact: Artifact) -> str:
    lines = [_HEADINGS, *(_table_line(table) for table in artifact.tables.values())]
    total = sizes(artifact.tables.values())
    lines.append(("total", "", f"{total['num_embeddings']:,}", *[""] * 8, *_size_cells(total)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text_columns = {0, 1, 9, 10}
    rows = [
        "  ".join(
            cell.ljust(w) if i in text_columns else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    heading = f"{artifact.path}\nversion {artifact.version}, made {artifact.created_at} by {artifact.producer}\n"
    note = "bytes: codes and values, or dense vectors, on disk; ratio: full bytes (fp32) / bytes, the vocabulary apart"
    return "\n".join([heading, *(row.rstrip() for row in rows), "", note])


def _table_line(table: Table) -> tuple[str, ...]:
    manifest = table.manifest
    values = f"{_values_type(table)}{', shared' if manifest.shared_values else ''}"
    code_sizes = (str(manifest.num_subspaces), table.shown_levels, f"{manifest.num_codes:,}")
    return (
        *(table.name, manifest.kind, f"{manifest.num_embeddings:,}", str(manifest.embedding_dim)),
        *((*code_sizes, str(manifest.code_bits)) if manifest.has_codes else "----"),
        *(table.shown_row_bytes, values, table.vocabulary.kind),
        *_size_cells(sizes([table])),
    )


def _size_cells(found: dict[str, Any]) -> tuple[str, ...]:
    counts = (f"{found[name]:,}" for name in ("artifact_bytes", "vocabulary_bytes", "full_bytes"))
    return (*counts, f"{found['compression_ratio']:.1f}")
