"""The whole page: what it shows, and that nothing in it comes from elsewhere or runs."""

import dataclasses
import json
import re

import numpy as np
import pytest

from dpq_rec import (
    CodeLayout,
    ConfigError,
    DamagedArtifactError,
    IdTypeError,
    Int64Vocabulary,
    StringVocabulary,
    UnknownTableError,
    open_artifact,
    unpack_codes,
    write_artifact,
)
from dpq_rec.cli import read_run
from dpq_rec.report import write_report
from dpq_rec.report.charts import byte_text, percent
from dpq_rec.report.facts import measure
from tests.dpq_rec.builders import dense_contents, dpq_contents, overwrite
from tests.dpq_rec.report.reading import LAYOUT, report, rows_of, table_of

HOSTILE = '<script>alert("1")</script>&amp;\'\x00\u202e'


# Nothing from elsewhere


def assert_self_contained(page):
    assert page.find("script") == page.find("link") == page.find("img") == page.find("iframe") == []
    for element in page.find():
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"{name} of <{element.tag}>"
            assert name not in ("src", "srcset", "xlink:href", "action", "data")
            assert name != "href" or value.startswith("#")
            assert "url(" not in value
    style = page.one("style").text
    assert not re.search(r"@import|url\(|@font-face", style)
    assert "://" not in page.text


def test_page_is_self_contained(small):
    _, page, _ = small
    assert_self_contained(page)
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_page_shows_what_could_be_markup_as_text(tmp_path):
    vocabulary = StringVocabulary.from_ids([HOSTILE, "b", "c" * 1000])
    (tmp_path / "names.csv").write_text('id,title\nb,"<img src=x onerror=alert(1)>"\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.json").write_text(json.dumps({"recipe": "<b>bold</b>", "metrics": {"</style>": 1}}))
    contents = dpq_contents(3, LAYOUT, vocabulary=vocabulary)
    run = read_run(tmp_path / "run", {})
    _, page, _ = report(tmp_path, contents, names=tmp_path / "names.csv", run=run, ids=(HOSTILE, "</table>"))
    assert_self_contained(page)
    names = [name for name, *_ in rows_of(table_of(page))]
    assert names[0] == HOSTILE.replace("\x00", "\ufffd")
    assert "<img src=x onerror=alert(1)> b" in names
    assert f"{'c' * 120}\u2026" in names
    assert "Not in the vocabulary: </table>." in page.text
    assert "recipe <b>bold</b>" in page.text
    assert all(row.find("bdi") for row in table_of(page).find("td", "name"))


# The numbers


def test_page_shows_the_bytes_of_every_part(small):
    artifact, page, _ = small
    table = artifact.tables["t"]
    parts = measure(table).byte_parts
    assert parts == {
        "packed codes": 50 * 3,
        "values": 4 * 20 * 2 * 4,
        "vocabulary": 50 * (8 + 4) + 16 * 8,
        "header, padding": table.manifest.bytes - 150 - 640 - 600 - 128,
    }
    assert sum(parts.values()) == (artifact.path / table.manifest.file).stat().st_size
    bars = table_of(page).find("div", "bar")
    shown = [{i.attributes["title"]: i.attributes["style"] for i in bar.find("i")} for bar in bars[1:]]
    wanted = {f"{what}: {num:,} B": f"flex:{num} 0 0" for what, num in parts.items()}
    assert shown == [wanted, wanted]
    keys = [key.text for key in table_of(page).one("ul", "keys").find("li")]
    total = table.manifest.bytes
    assert keys == [f"{what} {byte_text(num)} {percent(num / total)}" for what, num in parts.items()]
    assert "A compression ratio of 2.0: 1,600 bytes as fp32, 790 of codes and values" in table_of(page).text


def test_page_counts_tensors_beside_the_known_ones(small):
    table = small[0].tables["t"]
    more = dataclasses.replace(table, tensors={**table.tensors, "tiers": np.zeros(7, np.int64)})
    assert measure(more).byte_parts["other tensors"] == 56


def test_page_adds_up_all_tables_dense_ones_too(tmp_path):
    contents = {"a": dpq_contents(100, LAYOUT), "b": dense_contents(np.ones((10, 4), np.float32))}
    _, page, _ = report(tmp_path, contents)
    full, on_disk = 100 * 8 * 4 + 160, 100 * 3 + 640 + 160
    tiles = [tile.text for tile in page.find("div", "tile")]
    assert tiles[:3] == [
        f"{full / on_disk:.1f}\u00d7compression ratio",
        f"{byte_text(on_disk)}codes and values",
        f"{byte_text(full)}the same as fp32",
    ]
    assert tiles[4] == "110rows in 2 tables"
    lines = [[cell.text for cell in line.find("td")] for line in page.one("table", "list").find("tr")[1:]]
    assert [line[0] for line in lines] == ["a", "b", "total"]
    assert lines[1] == [
        "b",
        "10",
        "4",
        *"\u2013\u2013\u2013",
        "16",
        "160 B",
        "0 B",
        "160 B",
        "1.0",
        *"\u2013\u2013",
        "1 of 4",
    ]
    assert table_of(page, "b").find("svg", "heat") == []
    assert [part.attributes["title"].split(":")[0] for part in table_of(page, "b").find("div", "bar")[1].find("i")] == [
        "vectors",
        "header, padding",
    ]


def steps_of_a_loop(codes_V, num_codes):
    """The heat map's row: of each step, from the most used to the least, how many codes it has."""
    widths = dict.fromkeys(range(8, 0, -1), 0)
    for code in range(num_codes):
        use = sum(c == code for c in codes_V) * num_codes / len(codes_V)
        limits = [0, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]
        if use:
            widths[sum(use >= limit for limit in limits)] += 1
    return [(f"u{step}", width) for step, width in widths.items() if width]


@pytest.mark.parametrize(
    "layout",
    [LAYOUT, CodeLayout(num_subspaces=1, num_codes=2), CodeLayout(num_subspaces=50, num_codes=300, num_levels=2)],
)
def test_heat_map_has_every_code_once_in_the_step_of_its_use(tmp_path, layout):
    artifact, page, _ = report(tmp_path, dpq_contents(80, layout))
    codes_VM = unpack_codes(artifact.tables["t"].tensors["packed_codes"], layout)
    groups = table_of(page).one("div", "heatgrid").one("svg", "heat").find("g")
    assert len(groups) == layout.codes_per_row
    for group, codes_V in zip(groups, codes_VM.T.tolist(), strict=True):
        cells = group.find("rect")
        got = [(cell.attributes["class"], int(cell.attributes["width"])) for cell in cells]
        assert got == steps_of_a_loop(codes_V, layout.num_codes)
        begins = [int(cell.attributes["x"]) for cell in cells]
        assert begins == np.cumsum([0, *(width for _, width in got)])[:-1].tolist()
        assert f"{len(set(codes_V))} of {layout.num_codes} codes used" in group.one("title").text


def test_page_tells_perplexity_dead_codes_and_entropy(small):
    artifact, page, _ = small
    codes_VM = unpack_codes(artifact.tables["t"].tensors["packed_codes"], LAYOUT)
    shares = [np.bincount(codes_V, minlength=20) / 50 for codes_V in codes_VM.T]
    entropies = [-sum(p * np.log(p) for p in share if p) for share in shares]
    unused = sum(int((share == 0).sum()) for share in shares)
    text = table_of(page).text
    assert f"{unused} of 80 codes ({percent(unused / 80)}) are used by no row" in text
    perplexities = np.exp(entropies)
    wanted = f"here {perplexities.min():.1f} to {perplexities.max():.1f}, {perplexities.mean():.1f} in the mean"
    assert wanted in text
    assert f"carry {sum(entropies) / np.log(2):.1f} bits of 20 stored" in text
    agree = np.mean([(a == b).sum() for a in codes_VM for b in codes_VM])
    assert f"two rows at random share {agree:.1f} of 4" in text


def test_page_tells_the_rank(small):
    artifact, page, _ = small
    rank = np.linalg.matrix_rank(artifact.tables["t"].decode(np.arange(50)))
    assert f"{rank} of 8: singular values" in table_of(page).text
    assert "of all 50 rows" in table_of(page).text


def test_page_says_that_rank_is_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("dpq_rec.report.facts._SAMPLE_NUMBERS", 8 * 20)
    _, page, _ = report(tmp_path, dpq_contents(50, LAYOUT))
    assert "of a sample of 20 of 50 rows, spread evenly" in table_of(page).text


def test_most_rank_is_what_the_one_hot_codes_in_use_have(tmp_path):
    for num_rows in (1, 3, 10, 200):
        layout = CodeLayout(num_subspaces=3, num_codes=6)
        path = write_artifact(tmp_path / str(num_rows), {"t": dpq_contents(num_rows, layout)})
        table = open_artifact(path).tables["t"]
        codes_VM = unpack_codes(table.tensors["packed_codes"], layout)
        one_hot = np.concatenate([np.eye(6)[codes_V] for codes_V in codes_VM.T], 1)
        most = measure(table).code_use.most_rank(1000)
        assert np.linalg.matrix_rank(one_hot) <= most
        assert num_rows < 200 or np.linalg.matrix_rank(one_hot) == most
    assert measure(table).code_use.most_rank(4) == 4


# A run's history


def test_page_draws_how_codes_changed(tmp_path):
    codes = [
        {"used_codes": [2] * 4, "perplexity": [2.0] * 4, "changed": None},
        {"used_codes": [2] * 4, "perplexity": [3.0] * 4, "changed": [0.2, 0.4, 0.6, 0.8]},
        {"used_codes": [2] * 4, "perplexity": [4.0] * 4, "changed": [0.1, 0.1, 0.2, 0.2]},
    ]
    history = [{"epoch": at, "codes": {"t": of}} for at, of in enumerate(codes, 1)]
    (tmp_path / "metrics.json").write_text(json.dumps({"history": history, "best_epoch": 2, "metrics": {}}))
    contents = dpq_contents(20, LAYOUT)
    tables = open_artifact(write_artifact(tmp_path / "other", {"t": contents})).tables
    _, page, _ = report(tmp_path, contents, run=read_run(tmp_path, tables))
    section = table_of(page)
    changed = section.one("svg", **{"aria-label": "codes changed"})
    assert [dot.text for dot in changed.find("circle")] == ["epoch 2: 50\u00a0%", "epoch 3: 15\u00a0%"]
    points = [tuple(map(float, point.split(","))) for point in changed.one("polyline").attributes["points"].split()]
    y_of = {tick.text: float(tick.attributes["y"]) - 4 for tick in changed.find("text", "tick") if "%" in tick.text}
    share = [(y - y_of["0\u00a0%"]) / (y_of["100\u00a0%"] - y_of["0\u00a0%"]) for _, y in points]
    assert share == pytest.approx([0.5, 0.15], abs=0.001)
    assert changed.one("line", "mark").attributes["x1"] == f"{points[0][0]:.2f}".rstrip("0").rstrip(".")
    perplexities = section.one("svg", **{"aria-label": "perplexity"}).find("circle")
    assert [dot.text for dot in perplexities] == ["epoch 1: 2.0", "epoch 2: 3.0", "epoch 3: 4.0"]
    assert "In the last epoch 15\u00a0% changed." in section.text


def test_page_without_a_run_draws_no_history(small):
    assert "Codes that changed" not in small[1].text


# The smallest and the oddest


@pytest.mark.parametrize(
    "contents",
    [
        dpq_contents(0, LAYOUT),
        dpq_contents(1, LAYOUT),
        dpq_contents(3, CodeLayout(num_subspaces=1, num_codes=2), subspace_dim=1),
        dpq_contents(5, CodeLayout(num_subspaces=2, num_codes=65_536), subspace_dim=1, dtype=np.float16, shared=True),
        dense_contents(np.zeros((0, 3), np.float32)),
        dense_contents(np.zeros((4, 1), np.float32)),
        dense_contents(np.array([[np.nan, 1], [2, 3]], np.float32)),
        dense_contents(np.ones((2, 2), np.float32), Int64Vocabulary.from_ids([])),
    ],
    ids=["no rows", "one row", "K=2 D=1", "K=65536", "dense, no rows", "zeros", "not a number", "no ids"],
)
def test_page_of_an_odd_table_is_whole(tmp_path, contents):
    _, page, _ = report(tmp_path, contents)
    assert_self_contained(page)
    text = "".join(part.text for part in page.find("body"))
    assert "nan" not in text
    assert all("nan" not in str(value) for element in page.find() for value in element.attributes.values())


# What goes wrong


def test_report_never_writes_over_a_file(tmp_path):
    artifact = open_artifact(write_artifact(tmp_path / "artifact", {"t": dpq_contents(3, LAYOUT)}))
    (tmp_path / "out.html").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out.html exists; name another file, or remove it"):
        write_report(artifact, tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text() == "mine"


def test_report_on_damaged_codes_says_so_and_leaves_nothing(tmp_path):
    path = write_artifact(tmp_path / "artifact", {"t": dpq_contents(9, CodeLayout(num_subspaces=5, num_codes=5))})
    overwrite(path, "t", "packed_codes", 8, b"\xff")
    with pytest.raises(DamagedArtifactError, match="'t': row 4 holds a code of 5 or more"):
        write_report(open_artifact(path), tmp_path / "out.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_report_leaves_nothing_where_the_page_cannot_be_written(tmp_path, monkeypatch):
    artifact = open_artifact(write_artifact(tmp_path / "artifact", {"t": dpq_contents(3, LAYOUT)}))

    def disk_full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_report(artifact, tmp_path / "out.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"ids": ("1",)}, ConfigError, "this artifact has the tables a, b; say whose ids they are with --table"),
        ({"ids": ("1",), "table": "c"}, UnknownTableError, "it has: a, b"),
        ({"table": "c"}, UnknownTableError, "it has: a, b"),
        ({"ids": ("x",), "table": "a"}, IdTypeError, "got 'x', want an integer: table 'a' has integer ids"),
    ],
)
def test_report_that_makes_no_sense_is_an_error(tmp_path, config, error, message):
    contents = {"a": dpq_contents(3, LAYOUT), "b": dpq_contents(3, LAYOUT)}
    artifact = open_artifact(write_artifact(tmp_path / "artifact", contents))
    with pytest.raises(error, match=message):
        write_report(artifact, tmp_path / "out.html", **config)
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_report_into_a_folder_that_is_not_there_is_an_error(tmp_path):
    artifact = open_artifact(write_artifact(tmp_path / "artifact", {"t": dpq_contents(3, LAYOUT)}))
    with pytest.raises(FileNotFoundError, match="nowhere is no folder; make it, or name a file elsewhere"):
        write_report(artifact, tmp_path / "nowhere" / "out.html")
