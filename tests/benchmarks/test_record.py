"""Lines of results."""

import json

from tests.benchmarks.record import append, line_of


def test_command_names_neither_the_results_nor_a_folder_of_the_machine(monkeypatch, tmp_path):
    flags = ["--rounds", "3", "--results", str(tmp_path / "r.jsonl"), "--plot", str(tmp_path / "a.png")]
    monkeypatch.setattr("sys.argv", ["bench", *flags])
    assert line_of("decode", {})["command"].endswith(" --rounds 3 --plot a.png")


def test_lines_are_added_to_those_that_are_there(tmp_path):
    for number in (1, 2):
        append(tmp_path / "new" / "results.jsonl", [{"number": number}])
    append(None, [{"number": 3}])
    lines = (tmp_path / "new" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"number": 1}, {"number": 2}]
