"""What the page shows of neighbours: which rows are chosen, how they are named, and the codes they share."""

import re

import numpy as np
from sklearn.metrics.pairwise import cosine_similarity

from dpq_rec import (
    CodeLayout,
    Int64Vocabulary,
    ModuloVocabulary,
    StringVocabulary,
    open_artifact,
    unpack_codes,
    write_artifact,
)
from dpq_rec.report import write_report
from tests.dpq_rec.builders import dense_contents, dpq_contents
from tests.dpq_rec.report.reading import LAYOUT, read_page, report, rows_of, table_of


def test_page_shows_the_neighbours_of_the_ids_asked_for_and_their_codes(small):
    artifact, page, _ = small
    table = artifact.tables["t"]
    vectors_VE = table.decode(np.arange(50))
    codes_VM = unpack_codes(table.tensors["packed_codes"], LAYOUT)
    shown = rows_of(table_of(page))
    strips = table_of(page).find("svg", "strip")
    assert [name for name, *_ in shown[::9]] == ["107", "100"]
    for first, row in ((0, 7), (9, 0)):
        cosines_V = cosine_similarity(vectors_VE[row : row + 1], vectors_VE)[0]
        wanted = sorted((v for v in range(50) if v != row), key=lambda v, c=cosines_V: -c[v])[:8]
        same = [(codes_VM[v] == codes_VM[row]) for v in wanted]
        assert [cells[0] for cells in shown[first + 1 : first + 9]] == [str(v + 100) for v in wanted]
        assert [cells[1] for cells in shown[first + 1 : first + 9]] == [f"{cosines_V[v]:.3f}" for v in wanted]
        assert [cells[2] for cells in shown[first + 1 : first + 9]] == [str(s.sum()) for s in same]
        for strip, v, s in zip(strips[first + 1 : first + 9], wanted, same, strict=True):
            cells = strip.find("text")
            assert [int(cell.text) for cell in cells] == codes_VM[v].tolist()
            assert [cell.attributes["class"] == "same" for cell in cells] == s.tolist()


def test_codes_of_long_rows_are_coloured_without_numbers(tmp_path):
    layout = CodeLayout(num_subspaces=100, num_codes=3)
    artifact, page, _ = report(tmp_path, dpq_contents(20, layout), ids=("4",))
    first, second, *_ = table_of(page).find("svg", "strip")
    codes_VM = unpack_codes(artifact.tables["t"].tensors["packed_codes"], layout)
    nearest = int(rows_of(table_of(page))[1][0])
    assert first.find("text") == second.find("text") == []
    assert len(re.findall("M", first.one("path").attributes["d"])) == 100
    same = np.flatnonzero(codes_VM[4] == codes_VM[nearest])
    assert [int(m) for m in re.findall(r"M(\d+) 0h1v1h-1z", second.one("path").attributes["d"])] == same.tolist()


def test_page_chooses_first_rows_where_no_ids_are_asked_for(tmp_path):
    _, page, reported = report(tmp_path, dpq_contents(500, LAYOUT))
    chosen = [line.one("td", "name").text for line in table_of(page).find("tr", "chosen")]
    assert len(chosen) == 5
    assert all(int(name) < 100 for name in chosen)
    assert reported == (0, 0, [])


def test_page_names_ids_by_their_titles(tmp_path):
    (tmp_path / "names.csv").write_text("t,title\n101,One\n102,Two\n999,None\n")
    contents = dpq_contents(4, LAYOUT, vocabulary=Int64Vocabulary.from_ids([100, 101, 102, 103]))
    _, page, reported = report(tmp_path, contents, names=tmp_path / "names.csv", ids=("101",))
    assert sorted(name for name, *_ in rows_of(table_of(page))) == ["100", "103", "One 101", "Two 102"]
    assert reported == (4, 2, [])
    assert "Titles from names.csv, column title" in page.one("footer").text


def test_page_shows_the_table_with_titles_first(tmp_path):
    (tmp_path / "names.csv").write_text("b,title\n0,Zero\n")
    vectors_VE = np.eye(3, dtype=np.float32)
    contents = {"a": dense_contents(vectors_VE), "b": dense_contents(vectors_VE)}
    _, page, _ = report(tmp_path, contents, names=tmp_path / "names.csv", ids=("0",))
    assert [section.attributes["id"] for section in page.find("section") if "id" in section.attributes] == ["b", "a"]
    assert rows_of(table_of(page, "b"))[0][0] == "Zero 0"
    assert rows_of(table_of(page, "a"))[0][0] == "0"


def test_page_tells_of_shared_rows_and_of_rows_without_an_id(tmp_path):
    contents = dense_contents(np.eye(3, dtype=np.float32), Int64Vocabulary.from_pairs([7, 8, 9, 5], [0, 2, 2, 2]))
    _, page, _ = report(tmp_path, contents, ids=("9", "8"))
    names = [name for name, *_ in rows_of(table_of(page))]
    assert names == ["9 and 2 more", "7", "row 1 (no id lives here)", "8 and 2 more", "7", "row 1 (no id lives here)"]


def test_page_takes_the_ids_of_every_kind_of_vocabulary(tmp_path):
    vectors_VE = np.eye(3, dtype=np.float32)
    contents = {
        "modulo": dense_contents(vectors_VE, ModuloVocabulary(3)),
        "string": dense_contents(vectors_VE, StringVocabulary.from_ids(["", "ü", "1"])),
        "identity": dense_contents(vectors_VE),
    }
    artifact = open_artifact(write_artifact(tmp_path / "artifact", contents))
    firsts = {}
    for table, an_id in (("modulo", "-1"), ("string", ""), ("identity", "1")):
        out = tmp_path / f"{table}.html"
        write_report(artifact, out, ids=(an_id,), table=table)
        firsts[table] = rows_of(table_of(read_page(out), table))[0][0]
    assert firsts == {"modulo": "-1", "string": "\u201c\u201d", "identity": "1"}
