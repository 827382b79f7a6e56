"""The benchmarks of the service, at sizes that say nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def bench(*arguments):
    command = [sys.executable, "-m", "tests.benchmarks.service", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_load_leaves_a_line_for_each_protocol_kind_of_ids_and_rate_and_a_picture(tmp_path):
    sizes = ["--rates", 20, 40, "--seconds", 0.5, "--num-ids", 8, "--num-embeddings", 1000]
    done = bench("load", *sizes, "--plot", tmp_path / "load.png", "--results", tmp_path / "load.jsonl")
    assert done.returncode == 0, done.stderr
    lines = lines_of(tmp_path / "load.jsonl")
    assert len(lines) == 2 * 3 * 2
    assert {line["num_answered"] for line in lines} == {10, 20}
    assert all(0 < line["p50_ms"] <= line["p99.9_ms"] for line in lines)
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_start_leaves_seconds_and_memory(tmp_path):
    done = bench("start", "--num-embeddings", 5000, "--num-rounds", 1, "--results", tmp_path / "start.jsonl")
    assert done.returncode == 0, done.stderr
    (line,) = lines_of(tmp_path / "start.jsonl")
    for size in ("small", "large"):
        assert line["seconds_to_ready"][size] > 0
        assert line["worker_megabytes"][size]["anonymous"] > 1


@pytest.mark.parametrize("arguments", [["guess"], ["load", "--rates", "0"]])
def test_what_cannot_be_measured_is_named(arguments):
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "want" in done.stderr
