"""`python -m tests.benchmarks.quality`: run what is missing of the grid, list it, draw it."""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from dpq_rec import ConfigError, DpqRecError
from tests.benchmarks.quality import bootstrap, pictures, report
from tests.benchmarks.quality.case import Case
from tests.benchmarks.quality.plan import plan
from tests.benchmarks.quality.runner import Line, Places, missing, read_lines, run

RESULTS = Path(__file__).parents[1] / "results" / "quality.jsonl"
_EXAMPLES = """examples:
  python -m tests.benchmarks.quality --data DATA --out quality-run            # all that is missing; the same to go on
  python -m tests.benchmarks.quality --data DATA --out quality-run --only 'gowalla/dpq-*' --only '*/full'
  python -m tests.benchmarks.quality --list
  python -m tests.benchmarks.quality --out quality-run --compare              # all against full, user by user
  python -m tests.benchmarks.quality --out quality-run --compare --only 'gowalla/dpq-*'   # what else is known stays
  python -m tests.benchmarks.quality --draw"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, 1 where cases failed, or 2 for settings that make no sense."""
    options = _parser().parse_args(arguments)
    try:
        lines = read_lines(options.results)
        if options.list:
            print(listing(lines, options.only))
        elif options.draw:
            for path in pictures.draw(lines, options.results.parent):
                print(path, file=sys.stderr)
            print(report.tables(lines, bootstrap.read(options.results.parent)))
        elif options.compare:
            some = [
                line
                for line in lines
                if line["method"] == "full" or _is_wanted(Case.from_dict(line["case"]), options.only)
            ]
            compared = bootstrap.compare(some, _given(options.out, "--out"))
            if not compared:
                raise ConfigError(f"--only: got {', '.join(options.only)}; no finished case of --list is so named")
            print(bootstrap.write(compared, options.results.parent, keep_others=bool(options.only)))
        else:
            places = Places(_given(options.data, "--data"), _given(options.out, "--out"), options.results)
            return 1 if run(lambda seen: _wanted(seen, options.only), places, jobs=options.jobs) else 0
    except DpqRecError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.quality",
        description="DPQ beside full tables and every baseline, at equal bytes. Each case is one line of the results.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of data sets, one folder each")
    parser.add_argument("--out", type=Path, help="folder for runs; what lies in it stays on this machine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of results (default: %(default)s)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="of dataset/method[/stage]; may be given again"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time (default: 1)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--list", action="store_true", help="show what is done and what is left, and how long it may take"
    )
    what.add_argument("--draw", action="store_true", help="draw the pictures, print the tables")
    what.add_argument("--compare", action="store_true", help="bootstrap over users, of cases in --out")
    return parser


def _given(path: Path | None, flag: str) -> Path:
    if path is None:
        raise ConfigError(f"{flag} is missing")
    return path


def _is_wanted(case: Case, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns, if there are any, describes the case's name or a beginning of it."""
    endings = ("", "*")
    return not patterns or any(fnmatch.fnmatch(case.name, each + end) for each in patterns for end in endings)


def _wanted(lines: Sequence[Line], patterns: Sequence[str]) -> list[Case]:
    """The cases that are determined by now and that the patterns describe."""
    return [case for case in plan(lines) if _is_wanted(case, patterns)]


def listing(lines: Sequence[Line], patterns: Sequence[str] = ()) -> str:
    """What is done and what is left, with seconds; an estimate is what an epoch of the like took."""
    cases = _wanted(lines, patterns)
    left = {case.name for case in missing(plan, lines)}
    seconds = {Case.from_dict(line["case"]).name: line["seconds"] for line in lines}
    rows, total = [], 0.0
    for case in cases:
        if case.name not in left:
            rows.append(f"done  {seconds[case.name]:8.0f} s  {case.name}")
            continue
        guess = estimate(case, lines)
        total += guess or 0
        rows.append(f"left  {'       ?' if guess is None else f'{guess:8.0f}'} s  {case.name}")
    rows.append(f"{len(cases) - sum(row.startswith('left') for row in rows)} done, {len(cases)} determined by now")
    rows.append(f"about {total / 3600:.1f} hours left, of those with an estimate")
    return "\n".join(rows)


def estimate(case: Case, lines: Sequence[Line]) -> float | None:
    """Seconds that a case may take, by the median of its like; None where nothing like it is done."""
    done = [(Case.from_dict(line["case"]), line["seconds"]) for line in lines if line["dataset"] == case.dataset]
    alike = [(other, taken) for other, taken in done if bool(other.of) == bool(case.of)]
    same = [(other, taken) for other, taken in alike if other.method == case.method] or alike
    if not same:
        return None
    return case.epochs * statistics.median(taken / other.epochs for other, taken in same)
