"""The benchmark of lookups, at sizes that say nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SIZES = ["--num-embeddings", 500, "--num-ids", 50, "--num-rounds", 3]


def bench(*arguments):
    command = [sys.executable, "-m", "tests.benchmarks.library", "lookup", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_lookup_leaves_a_line_for_each_kind_of_ids(tmp_path):
    results = tmp_path / "lookup.jsonl"
    done = bench(*SIZES, "--results", results)
    assert done.returncode == 0, done.stderr
    assert "V=500 E=64 D=16 K=256, int64 ids, 50 uniform ids, median of 3 rounds" in done.stdout
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["ids"] for line in lines] == ["uniform", "hot"]
    for line in lines:
        assert list(line["contenders"]) == [
            *("lookup", "lookup, fp16", "lookup, 2 threads", "write the output", "write the output, fp16")
        ]
        assert line["contenders"]["write the output"]["times_baseline"] == 1
        assert line["contenders"]["lookup"]["per_second"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-ids", 0], "num_ids: got 0"),
        (["--num-subspaces", 7], "num_subspaces 7 does not divide 64"),
        (["--num-codes", 1], "num_codes: got 1"),
    ],
)
def test_lookup_names_what_cannot_be_measured(flags, message):
    done = bench(*SIZES, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_make_bench_measures_lookups():
    recipe = (Path(__file__).parents[3] / "Makefile").read_text().partition("\nbench:")[2].partition("\n\n")[0]
    assert "tests.benchmarks.library lookup" in recipe
