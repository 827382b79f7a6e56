import subprocess
import sys

import pytest

import dpq_rec
from tests.dpq_rec.builders import small_artifact

OPTIONAL = ("torch", "torchrec", "pyarrow", "tqdm", "safetensors", "grpc", "fastapi")


def run_without(modules, code, *arguments):
    """Run code in a fresh interpreter in which the modules cannot be imported."""
    hidden = f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n"
    command = [sys.executable, "-c", hidden + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "module", ["dpq_rec", "dpq_rec.cli", "dpq_rec.export", "dpq_rec.report", "tests.benchmarks.library"]
)
def test_import_loads_numpy_alone(module):
    code = f"import sys, {module}\nprint(sorted(name for name in {OPTIONAL!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("command", ["inspect", "report", "verify", "lookup"])
def test_command_works_with_numpy_alone(tmp_path, command):
    path = small_artifact(tmp_path / "artifact")
    rest = {"lookup": ["--table", "dense", "1"], "report": ["--report", tmp_path / "out.html"]}.get(command, [])
    code = "from dpq_rec.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run_without(OPTIONAL, code, "inspect" if command == "report" else command, path, *rest)
    assert (done.returncode, done.stderr) == (0, "")


def test_bench_says_how_to_install_torch():
    code = "from tests.benchmarks.command import run; sys.exit(run('tests.benchmarks.library', {'decode': ''}))"
    done = run_without(("torch",), code, "decode")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("torch")
    assert "pip install 'dpq-rec[train]'" in done.stderr


def test_dpq_rec_exports_what_it_says():
    pinned = """
        Artifact ArtifactError CodeLayout ConfigError DPQConfig DamagedArtifactError DpqRecError EmbeddingStore
        IdTypeError IdentityVocabulary Int64Vocabulary Lookup MissingDependencyError ModuloVocabulary Neighbours
        StringVocabulary TableContents UnknownIdsError UnknownTableError Vocabulary open_artifact pack_codes publish
        unpack_codes verify write_artifact
    """
    assert sorted(dpq_rec.__all__) == sorted(pinned.split())
    assert set(dpq_rec.__all__) <= set(dir(dpq_rec))
