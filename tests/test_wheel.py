"""The wheel as a stranger gets it: what is in it, and what works in a fresh environment without torch."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dpq_rec import CodeLayout, EmbeddingStore, Int64Vocabulary, TableContents, pack_codes, write_artifact

CHECKOUT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(600)  # a compiler runs, and pip


def run(*command, cwd):
    """Outside the checkout, with no path to it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Compiled without optimisation, which takes a minute more: what the wheel holds is tested here, and that it runs.
    debug = "-Ccmake.build-type=Debug"
    done = run(sys.executable, "-m", "build", "--wheel", debug, "--outdir", folder, CHECKOUT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """The scripts' folder of an environment that holds the wheel, its [export] extra, and nothing else."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=True)
    scripts = folder / "venv" / "bin"
    done = run(scripts / "python", "-m", "pip", "install", "--quiet", f"{wheel}[export]", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return scripts


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    layout, generator = CodeLayout(num_subspaces=4, num_codes=20), np.random.default_rng(0)
    contents = TableContents(
        num_embeddings=50,
        embedding_dim=8,
        vocabulary=Int64Vocabulary.from_ids(np.arange(50) * 3 - 9),
        layout=layout,
        values=generator.standard_normal((4, 20, 2)).astype(np.float32),
        chunks=[pack_codes(generator.integers(0, 20, (50, 4)), layout)],
    )
    return write_artifact(tmp_path_factory.mktemp("data") / "artifact", {"item_id": contents}, version="v1")


def test_wheel_holds_the_library_and_nothing_else(names):
    assert {name.split("/")[0] for name in names} == {"dpq_rec", "dpq_rec-0.1.0.dist-info"}


def test_wheel_holds_the_compiled_kernels_and_no_source_of_them(names):
    in_library = [Path(name) for name in names if name.startswith("dpq_rec/")]
    assert {path.suffix for path in in_library} == {".py", ".pyi", ".so", ".typed", ".css"}
    assert [path.name.split(".")[0] for path in in_library if path.suffix == ".so"] == ["_native"]


def test_wheel_holds_every_module_and_the_license(names):
    modules = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "dpq_rec").rglob("*.py")}
    assert modules <= set(names)
    assert {"dpq_rec/py.typed", "dpq_rec-0.1.0.dist-info/licenses/LICENSE"} <= set(names)


def test_fresh_environment_has_no_torch_and_no_checkout(fresh, tmp_path):
    code = "import importlib.util as u, dpq_rec; print(u.find_spec('torch'), u.find_spec('service'), dpq_rec.__file__)"
    done = run(fresh / "python", "-c", code, cwd=tmp_path)
    assert done.stdout.startswith(f"None None {fresh.parent}"), done.stdout + done.stderr


def test_wheel_inspects(fresh, artifact, tmp_path):
    done = run(fresh / "dpq-rec", "inspect", artifact, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["tables"]["item_id"]["num_embeddings"] == 50


def test_wheel_reports(fresh, artifact, tmp_path):
    (tmp_path / "names.csv").write_text("item_id,title\n0,Zero\n")
    options = ["--report", "out.html", "--names", "names.csv", "--ids", "0"]
    done = run(fresh / "dpq-rec", "inspect", artifact, *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "out.html: 1 table(s), titles of 1 of 9 ids\n"), done.stderr
    assert "<bdi>Zero</bdi>" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_wheel_verifies(fresh, artifact, tmp_path):
    done = run(fresh / "dpq-rec", "verify", artifact, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "is sound" in done.stdout


def test_wheel_looks_up(fresh, artifact, tmp_path):
    done = run(fresh / "dpq-rec", "lookup", artifact, "--table", "item_id", "-9", "1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    reply = json.loads(done.stdout)
    wanted = EmbeddingStore.open(artifact).lookup("item_id", [-9, 1])
    assert reply["missing"] == [1]
    assert np.array(reply["vectors"], np.float32).tobytes() == wanted.vectors.tobytes()


def test_wheel_exports(fresh, artifact, tmp_path):
    done = run(fresh / "dpq-rec", "export", artifact, "--table", "item_id", "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    code = "import pyarrow.parquet as pq; print(pq.read_table('out/part-00000.parquet').num_rows)"
    assert run(fresh / "python", "-c", code, cwd=tmp_path).stdout == "50\n"
