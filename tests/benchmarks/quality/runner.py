"""The cases that are missing, one process each. In: the plan. Out: lines added to a file, as they come.

A case whose line is in the file is not done again. A case that is done but whose line was not added, since the runner
was killed, gets its line; one that was cut off goes on from its checkpoint. A case that fails leaves its log.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dpq_rec import ConfigError
from tests.benchmarks.quality.case import Case
from tests.benchmarks.quality.worker import LINE

Line = dict[str, Any]
Plan = Callable[[Sequence[Line]], list[Case]]
_POLL_SECONDS = 0.2


class Places(NamedTuple):
    """Where data sets are read, cases are done, and lines are added."""

    data: Path
    out: Path
    results: Path


def read_lines(path: Path) -> list[Line]:
    """The lines of a file of results; none where there is no file.

    Raises:
        ConfigError: a line is no JSON.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ConfigError(f"{path}: got a line that is no JSON: {error}; remove what a crash left") from error


def missing(plan: Plan, lines: Sequence[Line]) -> list[Case]:
    """The determined cases that have no line."""
    done = {Case.from_dict(line["case"]).name for line in lines}
    return [case for case in plan(lines) if case.name not in done]


def run(plan: Plan, places: Places, *, jobs: int = 1) -> list[Case]:
    """Do all that is missing, also what is determined only on the way.

    Args:
        plan: lines -> the cases that are determined by them, in the order to run them.
        places: see `Places`.
        jobs: processes at a time.

    Returns:
        The cases that failed.

    Raises:
        ConfigError: another runner is at work in the same folder.
    """
    places.out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, Case] = {}
    running: dict[str, tuple[Case, subprocess.Popen[bytes]]] = {}
    with _claimed(places.out), tqdm(unit="case") as bar:
        try:
            while True:
                lines = read_lines(places.results)
                left = [case for case in missing(plan, lines) if case.name not in failed]
                bar.total, bar.n = len(lines) + len(left), len(lines)
                bar.set_postfix_str(", ".join(running), refresh=True)
                waiting = [case for case in left if case.name not in running]
                if not waiting and not running:
                    return list(failed.values())
                for case in waiting[: jobs - len(running)]:
                    running[case.name] = (case, _begin(case, places))
                for name in _ended(running):
                    case, process = running.pop(name)
                    if not _add_line(case, process, places):
                        failed[name] = case
                        bar.write(f"failed: {name}, see {places.out / name / 'log'}")
        finally:
            for _, process in running.values():
                process.terminate()
                process.wait()


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out: another run of the grid is at work in {out}; wait for it or stop it") from None
        yield


def _begin(case: Case, places: Places) -> subprocess.Popen[bytes]:
    """A process at work on a case; one that has nothing to do where it is done."""
    folder = places.out / case.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", ""]
    if not (folder / LINE).exists():
        (folder / "case.json").write_text(json.dumps(case.as_dict(), indent=1))
        command = [sys.executable, "-m", "tests.benchmarks.quality.worker", str(folder / "case.json")]
        command += ["--data", str(places.data), "--out", str(places.out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for a busy core make minutes of seconds
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _ended(running: dict[str, tuple[Case, subprocess.Popen[bytes]]]) -> list[str]:
    """Names of the cases that have ended, one at least."""
    while True:
        ended = [name for name, (_, process) in running.items() if process.poll() is not None]
        if ended:
            return ended
        time.sleep(_POLL_SECONDS)


def _add_line(case: Case, process: subprocess.Popen[bytes], places: Places) -> bool:
    """Add what a case left to the results; whether it left anything."""
    path = places.out / case.name / LINE
    if process.returncode != 0 or not path.exists():
        return False
    line = json.dumps(json.loads(path.read_text()))
    places.results.parent.mkdir(parents=True, exist_ok=True)
    with places.results.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    return True
