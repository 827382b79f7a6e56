import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dpq_rec import EmbeddingStore, open_artifact
from dpq_rec.cli import main
from tests.dpq_rec.builders import edit_manifest, overwrite, small_artifact, word_artifact


@pytest.fixture
def path(tmp_path):
    return small_artifact(tmp_path / "artifact")


def run(capsys, *arguments):
    """Exit code, stdout and stderr of the command, in this process."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def assert_one_line(stderr, *parts):
    assert stderr.count("\n") == 1
    assert stderr.startswith("dpq-rec: ")
    for part in parts:
        assert part in stderr


# lookup


def test_lookup_prints_the_http_json(capsys, path):
    code, stdout, stderr = run(capsys, "lookup", path, "--table", "dense", "2", "0")
    reply = {"table": "dense", "version": "v1", "dim": 4, "vectors": [[8, 9, 10, 11], [0, 1, 2, 3]], "missing": []}
    assert (code, json.loads(stdout), stderr) == (0, reply, "")


def test_lookup_prints_numbers_that_are_the_float32_vectors_when_read(capsys, path):
    _, stdout, _ = run(capsys, "lookup", path, "--table", "item", "40", "7")
    vectors_NE = EmbeddingStore.open(path).lookup("item", [40, 7]).vectors
    assert vectors_NE.dtype.type(json.loads(stdout)["vectors"]).tobytes() == vectors_NE.tobytes()


def test_lookup_prints_the_json_and_leaves_with_1_where_an_id_is_missing(capsys, path):
    code, stdout, stderr = run(capsys, "lookup", path, "--table", "dense", "9", "1", "-1")
    assert (code, stderr) == (1, "")
    reply = json.loads(stdout)
    assert reply["missing"] == [0, 2]
    assert reply["vectors"] == [[0, 0, 0, 0], [4, 5, 6, 7], [0, 0, 0, 0]]


def test_lookup_takes_negative_ids(capsys, path):
    code, stdout, _ = run(capsys, "lookup", path, "--table", "item", "-3")
    assert (code, json.loads(stdout)["missing"]) == (0, [])


def test_lookup_of_an_unknown_table_names_the_tables(capsys, path):
    code, stdout, stderr = run(capsys, "lookup", path, "--table", "usr", "1")
    assert (code, stdout) == (2, "")
    assert_one_line(stderr, "'usr'", "dense, item")


@pytest.mark.parametrize("wrong", ["abc", "1.5", ""])
def test_lookup_of_an_id_that_is_no_integer_is_usage(capsys, path, wrong):
    code, stdout, stderr = run(capsys, "lookup", path, "--table", "item", "1", wrong)
    assert (code, stdout) == (2, "")
    assert_one_line(stderr, f"ID: got {wrong!r}, want an integer: table 'item' has integer ids")


def test_lookup_of_an_id_beyond_64_bits_is_usage(capsys, path):
    code, _, stderr = run(capsys, "lookup", path, "--table", "item", str(2**64))
    assert code == 2
    assert_one_line(stderr, "64-bit integers")


def test_lookup_of_a_damaged_row_leaves_with_1(capsys, path):
    overwrite(path, "item", "packed_codes", 0, b"\xff")
    code, stdout, stderr = run(capsys, "lookup", path, "--table", "item", "40")
    assert (code, stdout) == (1, "")
    assert_one_line(stderr, "row 0 holds a code of 5 or more", "get a sound copy")


@pytest.fixture
def word_path(tmp_path):
    return word_artifact(tmp_path / "words")


def test_lookup_takes_ids_of_a_table_of_strings_as_they_are(capsys, word_path):
    code, stdout, stderr = run(capsys, "lookup", word_path, "--table", "word", "7", "the", "ü", "THE", "")
    reply = json.loads(stdout)
    assert (code, stderr, reply["missing"]) == (1, "", [3])
    assert [vector[0] for vector in reply["vectors"]] == [2, 0, 4, 0, 6]


def test_lookup_takes_ids_that_begin_with_a_hyphen_after_two_hyphens(capsys, word_path):
    code, stdout, _ = run(capsys, "lookup", word_path, "--table", "word", "--", "-ing", "the")
    assert (code, [vector[0] for vector in json.loads(stdout)["vectors"]]) == (0, [8, 0])


def test_lookup_of_an_id_that_is_no_text_is_usage(word_path):
    command = [Path(sys.executable).with_name("dpq-rec"), "lookup", word_path, "--table", "word", b"\xff"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, "half a surrogate pair at position 0")


def test_verify_and_inspect_name_the_vocabulary_of_strings(capsys, word_path):
    code, stdout, _ = run(capsys, "verify", word_path)
    assert (code, stdout.splitlines()[0].split()[-2:]) == (0, ["string", "vocabulary"])
    code, stdout, _ = run(capsys, "inspect", word_path)
    word = next(line.split() for line in stdout.splitlines() if line.startswith("word"))
    assert (code, word[-5:]) == (
        0,
        ["string", "40", "110", "40", "1.0"],
    )  # 10 bytes of text, 6 offsets, 5 rows, 8 slots


# verify


def test_verify_says_what_it_checked(capsys, path):
    code, stdout, stderr = run(capsys, "verify", path)
    assert (code, stderr) == (0, "")
    item, dense, last = stdout.splitlines()
    assert item.startswith("item: sha256 of ")
    assert item.endswith("codes and padding bits of 4 rows, int64 vocabulary")
    assert dense.startswith("dense: sha256 of ")
    assert last == f"{path} is sound: version v1, 2 table(s)"


@pytest.mark.parametrize("forge_digest", [False, True])
def test_verify_leaves_with_1_where_a_byte_is_wrong(capsys, path, forge_digest):
    overwrite(path, "item", "packed_codes", 0, b"\xff", forge_digest=forge_digest)
    code, stdout, stderr = run(capsys, "verify", path)
    assert (code, stdout) == (1, "")
    assert_one_line(stderr, "row 0" if forge_digest else "sha256")


# inspect


def test_inspect_lists_the_tables(capsys, path):
    code, stdout, stderr = run(capsys, "inspect", path)
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[:2] == [str(path), f"version v1, made {open_artifact(path).created_at} by dpq_rec 0.1.0"]
    item = next(line.split() for line in lines if line.startswith("item"))
    assert item == ["item", "dpq", "4", "10", "5", "1", "5", "3", "2", "float32", "int64", "208", "48", "160", "0.8"]
    dense = next(line.split() for line in lines if line.startswith("dense"))
    assert dense == [
        "dense",
        "dense",
        "3",
        "4",
        "-",
        "-",
        "-",
        "-",
        "16",
        "float32",
        "identity",
        "48",
        "0",
        "48",
        "1.0",
    ]
    total = next(line.split() for line in lines if line.startswith("total"))
    assert total == ["total", "7", "256", "48", "208", "0.8"]


def test_inspect_prints_json_for_programs(capsys, path):
    code, stdout, _ = run(capsys, "inspect", path, "--json")
    found = json.loads(stdout)
    assert code == 0
    assert found["version"] == "v1"
    item = found["tables"]["item"]
    assert (item["kind"], item["num_embeddings"], item["row_bytes"], item["values_dtype"]) == ("dpq", 4, 2, "float32")
    sizes = {"num_embeddings": 7, "full_bytes": 208, "artifact_bytes": 256, "vocabulary_bytes": 48}
    assert found["total"] == {**sizes, "compression_ratio": 208 / 256}


def test_inspect_of_a_damaged_manifest_leaves_with_1(capsys, path):
    (path / "manifest.json").write_text("{\n\n")
    code, stdout, stderr = run(capsys, "inspect", path)
    assert (code, stdout) == (1, "")
    assert_one_line(stderr, "manifest.json")


def test_inspect_of_a_newer_artifact_is_usage(capsys, path):
    edit_manifest(path, lambda manifest: manifest.update(format_version=2))
    code, _, stderr = run(capsys, "inspect", path)
    assert code == 2
    assert_one_line(stderr, "this version reads dpq-rec version 1")


def test_inspect_writes_a_report(capsys, path, tmp_path):
    out = tmp_path / "out.html"
    (tmp_path / "names.csv").write_text("item,title\n7,Seven\n")
    code, stdout, stderr = run(
        capsys, "inspect", path, "--report", out, "--names", tmp_path / "names.csv", "--ids", "-3", "7"
    )
    assert (code, stdout, stderr) == (0, f"{out}: 2 table(s), titles of 1 of 4 ids\n", "")
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "<bdi>Seven</bdi>" in page


def test_inspect_reports_on_a_run_by_name(capsys, path, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.json").write_text('{"recipe": "two-tower", "metrics": {"ndcg@10": 0.25}}')
    code, _, _ = run(capsys, "inspect", path, "--report", tmp_path / "out.html", "--run", tmp_path / "run")
    assert code == 0
    assert "0.2500" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_inspect_shows_the_neighbours_of_string_ids(capsys, word_path, tmp_path):
    out = tmp_path / "out.html"
    code, _, _ = run(capsys, "inspect", word_path, "--report", out, "--ids", "ü", "the", "--ids=-ing")
    chosen = [line.partition("</bdi>")[0] for line in out.read_text(encoding="utf-8").split('class="chosen"')[1:]]
    assert (code, [text.rpartition(">")[2] for text in chosen]) == (0, ["ü", "the", "-ing"])


def test_inspect_leaves_with_1_where_an_id_is_missing_and_writes_the_page(capsys, path, tmp_path):
    out = tmp_path / "out.html"
    code, stdout, _ = run(capsys, "inspect", path, "--report", out, "--table", "item", "--ids", "8", "7")
    assert (code, stdout) == (1, f"{out}: 2 table(s)\nnot in the vocabulary: 8\n")
    assert "Not in the vocabulary: <bdi>8</bdi>" in out.read_text(encoding="utf-8")


def test_inspect_writes_no_report_on_damaged_codes(capsys, path, tmp_path):
    overwrite(path, "item", "packed_codes", 0, b"\xff")
    code, stdout, stderr = run(capsys, "inspect", path, "--report", tmp_path / "out.html")
    assert (code, stdout, (tmp_path / "out.html").exists()) == (1, "", False)
    assert_one_line(stderr, "'item': row 0 holds a code of 5 or more", "get a sound copy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "ARTIFACT"], "name another file"),
        (["--report", "OUT", "--names", "absent.csv"], "--names: absent.csv is no file"),
        (["--report", "OUT", "--ids", "7"], "say whose ids they are with --table"),
        (["--report", "OUT", "--ids", "x", "--table", "item"], "ID: got 'x', want an integer"),
        (["--report", "OUT", "--run", "ARTIFACT"], "holds no metrics.json"),
        (["--names", "n.csv", "--ids", "7"], "--names, --ids: of use beside --report alone; add --report out.html"),
        (["--table", "item", "--run", "run"], "--table, --run: of use beside --report alone"),
    ],
)
def test_a_report_that_makes_no_sense_is_usage(capsys, path, tmp_path, arguments, message):
    places = {"OUT": tmp_path / "out.html", "ARTIFACT": path}
    code, stdout, stderr = run(capsys, "inspect", path, *(places.get(argument, argument) for argument in arguments))
    assert (code, stdout, (tmp_path / "out.html").exists()) == (2, "", False)
    assert_one_line(stderr, message)


# export


def test_export_writes_parquet(capsys, path, tmp_path):
    code, stdout, stderr = run(capsys, "export", path, "--table", "dense", "--out", tmp_path / "out")
    assert (code, stdout, stderr) == (0, f"{tmp_path / 'out'}: 3 ids in 1 part(s)\n", "")
    assert pq.read_table(tmp_path / "out/part-00000.parquet")["vector"].to_pylist()[1] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("flags", "column", "element"),
    [([], "vector", "float"), (["--dtype", "float16"], "vector", "halffloat"), (["--codes"], "codes", "uint16")],
)
def test_export_has_the_flags_of_the_contract(capsys, path, tmp_path, flags, column, element):
    code, _, _ = run(capsys, "export", path, "--table", "item", "--out", tmp_path / "out", *flags)
    schema = pq.read_schema(tmp_path / "out/part-00000.parquet")
    assert (code, schema.names, str(schema.field(column).type.value_type)) == (0, ["id", column], element)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "usr", "--out", "OUT"], "it has: dense, item"),
        (["--table", "dense", "--out", "OUT", "--codes"], "export its vectors instead"),
        (["--table", "item", "--out", "OUT", "--codes", "--dtype", "float16"], "ask for one of the two"),
        (["--table", "item", "--out", "ARTIFACT"], "name another one"),
    ],
)
def test_export_that_makes_no_sense_is_usage(capsys, path, tmp_path, arguments, message):
    places = {"OUT": tmp_path / "out", "ARTIFACT": path}
    code, stdout, stderr = run(capsys, "export", path, *(places.get(argument, argument) for argument in arguments))
    assert (code, stdout) == (2, "")
    assert_one_line(stderr, message)
    assert not (tmp_path / "out").exists()


def test_export_without_pyarrow_says_how_to_install_it(capsys, path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, stderr = run(capsys, "export", path, "--table", "item", "--out", tmp_path / "out")
    assert code == 2
    assert_one_line(stderr, "pip install 'dpq-rec[export]'")


# publish


def test_publish_makes_the_artifact_the_current_version(capsys, path, tmp_path):
    code, stdout, stderr = run(capsys, "publish", path, tmp_path / "store")
    assert (code, stderr) == (0, "")
    assert stdout == f"{tmp_path / 'store/v1'} is the current version of {tmp_path / 'store'}\n"
    assert run(capsys, "verify", tmp_path / "store")[0] == 0


def test_publish_twice_is_usage(capsys, path, tmp_path):
    run(capsys, "publish", path, tmp_path / "store")
    code, _, stderr = run(capsys, "publish", path, tmp_path / "store")
    assert code == 2
    assert_one_line(stderr, "a version is published once")


def test_publish_of_a_damaged_artifact_leaves_with_1(capsys, path, tmp_path):
    overwrite(path, "item", "packed_codes", 0, b"\xff")
    code, _, stderr = run(capsys, "publish", path, tmp_path / "store")
    assert code == 1
    assert_one_line(stderr, "row 0")
    assert not (tmp_path / "store/CURRENT").exists()


# The command as a whole


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["verify"],
        ["lookup", "--table", "t", "1"],
        ["export", "--table", "t", "--out", "out"],
        ["publish", "store"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_path_that_holds_no_artifact_is_usage(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    code, stdout, stderr = run(capsys, command, "nowhere", *rest)
    assert (code, stdout) == (2, "")
    assert_one_line(stderr, "nowhere: holds neither manifest.json")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["lookup"],
        ["nonsense"],
        ["inspect", "a", "--wrong"],
        ["inspect", "a", "--json", "--report", "out.html"],
        ["lookup", "a", "1"],
        ["lookup", "a", "--table", "t"],
        ["export", "a", "--table", "t"],
        ["export", "a", "--table", "t", "--out", "o", "--dtype", "float64"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_usage(capsys, arguments):
    code, stdout, stderr = run(capsys, *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("usage: dpq-rec")


@pytest.mark.parametrize("command", ["", "export", "inspect", "verify", "lookup", "publish"])
def test_help_teaches_by_example(capsys, command):
    code, stdout, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    assert f"dpq-rec {command or 'lookup'} run/artifact" in stdout.split("example")[1]


def test_the_installed_command_leaves_with_the_exit_code(path):
    command = [Path(sys.executable).with_name("dpq-rec"), "lookup", path, "--table", "dense", "1", "99"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)["missing"], done.stderr) == (1, [1], "")


@pytest.mark.parametrize(
    "arguments", [["inspect", "ARTIFACT"], ["lookup", "ARTIFACT", "--table", "dense", *["1"] * 9_000]]
)
def test_a_reader_who_has_enough_ends_the_command_quietly(path, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [Path(sys.executable).with_name("dpq-rec"), *(path if a == "ARTIFACT" else a for a in arguments)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
