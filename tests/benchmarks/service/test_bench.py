"""The benchmarks of the service, at sizes that say nothing."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.benchmarks.service import processes, turns
from tests.benchmarks.service.setting import BenchConfig

SIZES = ["--num-embeddings", 500, "--num-codes", 20, "--num-ids", 8, "--num-rounds", 1, "--seconds", 1]
NEEDS = {"http": ["wrk"], "grpc": [], "redis": ["wrk", "redis-server", "redis-benchmark"]}
RATIOS = {
    "http": {"float32": "constant 2,048 bytes", "JSON": "FastAPI, jsonable_encoder"},
    "grpc": {"asyncio, streams of 256 ids": "asyncio, calls of 256 ids"},
    "redis": {"codes": "redis", "client of codes": "redis-py"},
}


def bench(*arguments, **environment):
    command = [sys.executable, "-m", "tests.benchmarks.service", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_benchmark_leaves_a_line_for_each_kind_of_ids(tmp_path, name):
    if absent := [program for program in NEEDS[name] if shutil.which(program) is None]:
        pytest.skip(f"{', '.join(absent)}: not installed")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: what is measured and what measures need one each")
    results = tmp_path / "results" / "lines.jsonl"
    done = bench(name, *SIZES, "--results", results)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["ids"] for line in lines] == ["uniform", "hot"]
    for line in lines:
        assert line["command"] == " ".join(map(str, [f"python -m tests.benchmarks.service {name}", *SIZES]))
        assert {"date", "machine", "versions"} <= set(line)
        for contender, baseline in RATIOS[name].items():
            assert line["contenders"][contender]["baseline"] == baseline
            assert line["contenders"][contender]["times_baseline"]["per_second"] > 0


@pytest.mark.parametrize("arguments", [["guess"], [], ["http", "--num-rounds", "0"]])
def test_what_cannot_be_measured_is_named(arguments):
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "want" in done.stderr


def test_a_program_that_is_missing_is_named_with_the_command_that_installs_it(tmp_path):
    done = bench("redis", *SIZES, PATH=str(tmp_path))
    assert done.returncode == 2
    assert "redis-server is not installed; install it: apt-get install redis-server" in done.stderr


def test_ratios_are_medians_of_the_rounds_ratios():
    rounds = {"a": [{"per_second": float(n)} for n in (1, 2, 100)], "b": [{"per_second": float(n)} for n in (2, 2, 50)]}
    found = turns.summary(rounds, {"b": "a"})
    assert found["b"] == {"per_second": 2, "baseline": "a", "times_baseline": {"per_second": 1}}


def test_a_first_round_does_not_count():
    counter = iter(range(100))
    rounds = turns.take_turns({"a": lambda: {"n": next(counter)}, "b": lambda: {"n": next(counter)}}, 2, "")
    assert rounds == {"a": [{"n": 2}, {"n": 4}], "b": [{"n": 3}, {"n": 5}]}


WRK = """\
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.60ms    2.00ms  30.00ms   87.50%
    Req/Sec    10.36k   550.01    11.20k    76.19%
  Latency Distribution
     50%  810.00us
     75%    1.00ms
     99%    1.06s
  5000 requests in 3.00s, 10MB read
Requests/sec:  34540.28
"""


def test_what_wrk_says_is_read_in_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "need", lambda program, package: program)
    done = subprocess.CompletedProcess([], 0, stdout=WRK)
    monkeypatch.setattr(processes.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(processes, "cores", lambda: (0, 1))
    requests = processes.Requests("/x", {}, np.zeros((2, 8), np.uint8))
    measured = processes.run_wrk(1, os.getpid(), requests, BenchConfig())
    assert measured[:3] == (34540.28, pytest.approx(810e-6), 1.06)


def test_processor_seconds_are_those_that_a_process_takes():
    child = subprocess.Popen(
        [sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass\ninput()"], stdin=subprocess.PIPE
    )
    end = time.monotonic() + 20
    while processes.processor_seconds(child.pid) < 0.45 and time.monotonic() < end:
        time.sleep(0.05)
    assert 0.45 <= processes.processor_seconds(child.pid) < 2
    child.communicate(b"\n")
