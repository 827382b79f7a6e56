"""The benchmark of finding ids, at sizes that say nothing, and the ids it makes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.benchmarks.library.find import integers_at, places_of, texts_of

SIZES = ["--num-known", 500, "--num-ids", 50, "--percent-unknown", 20, "--num-rounds", 3]


def bench(*arguments):
    command = [sys.executable, "-m", "tests.benchmarks.library", "find", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_find_leaves_a_line_for_each_kind_of_vocabulary_and_of_ids(tmp_path):
    results = tmp_path / "find.jsonl"
    done = bench(*SIZES, "--results", results)
    assert done.returncode == 0, done.stderr
    assert "50 hot ids, 20 % unknown, 1 thread, median of 3 rounds" in done.stdout
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    kinds = [(line["kind"], line["ids"]) for line in lines]
    assert kinds == [("int64", "uniform"), ("int64", "hot"), ("string", "uniform"), ("string", "hot")]
    assert list(lines[0]["contenders"]) == ["find", "find, no index", "numpy.searchsorted", "dict"]
    assert list(lines[2]["contenders"]) == ["find", "find, no index", "dict"]
    assert lines[0]["contenders"]["numpy.searchsorted"]["times_baseline"] == 1
    assert lines[0]["vocabulary_bytes"] == 500 * 12 + (16 + 32) * 8


def test_find_measures_one_kind_where_asked():
    assert "string" not in bench(*SIZES, "--kinds", "int64").stdout


def test_find_does_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import tests.benchmarks.library.find as find; find.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, SIZES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("percent", [-1, 101])
def test_find_names_a_share_that_cannot_be(percent):
    done = bench("--percent-unknown", percent)
    assert (done.returncode, done.stderr) == (2, f"percent_unknown: got {percent}, want 0 to 100\n")


@pytest.mark.parametrize("num_known", [1, 2, 500, 4096])
def test_integers_ascend_and_rows_have_places_of_their_own(num_known):
    rows_V = np.arange(num_known)
    ids_V = integers_at(rows_V, num_known)
    assert (ids_V[1:] > ids_V[:-1]).all()
    assert sorted(places_of(rows_V, num_known).tolist()) == rows_V.tolist()


def test_texts_differ_and_have_12_to_36_bytes():
    texts = texts_of(np.arange(5000))
    assert len(set(texts)) == 5000
    assert {len(text) for text in texts} == set(range(12, 37))
